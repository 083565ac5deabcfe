// lowbit_linear on the CPU: y = x W^T + b and its gradient x' = y' W. W is decoded in registers and caches
// only.
//
// Few rows of x: bound by reading W (few_rows.h). More: bound by multiply-adds (panels.h). Each output is
// summed by one thread in an order that depends on K, N, group_size and the path, not on the threads: the
// same bits from run to run.
#include <type_traits>

#include "cpu/linear/few_rows.h"
#include "cpu/linear/panels.h"

namespace bitfuse::BITFUSE_ISA {
namespace {

constexpr int64_t kCodeRows = 96;    // x rows up to which tiles decode codes themselves, where that is cheap
constexpr int64_t kShortGroup = 32;  // below it a group's sum is too short to pay for its scaling

template <class Code>
void forward(const LowbitLinearArgs& call) {
  const bool long_groups = call.w.group_size >= kShortGroup;
  const bool few = call.rows <= kFewRows;
#if BITFUSE_PAIRS
  if (call.dtype == Dtype::kBfloat16) {
    const bool exact = values_are_bfloat16(call.w);
    if (exact && Code::kPairsInTiles && few) return few_rows<PairSteps<Code>>(call);
    if (exact && long_groups && !few) {
      if (Code::kPairsInTiles && call.rows <= kCodeRows)
        return multiply<Forward<Code, Panel::kCodePairs>>(call);
      return multiply<Forward<Code, Panel::kExactPairs>>(call);
    }
    if (!few) return multiply<Forward<Code, Panel::kRoundedPairs>>(call);
  }
#endif
  if constexpr (std::is_same_v<Code, E4m3Code>) {
    if (few && LaneGroups::is_uniform(call.w, Code::kPerDword * kLanes)) return few_rows<E4m3ByteSteps>(call);
  }
  if (few) return few_rows<FloatSteps<Code>>(call);
  if (Code::kFloatsInTiles && long_groups && call.rows <= kCodeRows)
    return multiply<Forward<Code, Panel::kCodes>>(call);
  multiply<Forward<Code, Panel::kFloats>>(call);
}

template <class Code>
void gradient(const LowbitLinearArgs& call) {
#if BITFUSE_PAIRS
  if (call.dtype == Dtype::kBfloat16) return multiply<Gradient<Code, Panel::kRoundedPairs>>(call);
#endif
  multiply<Gradient<Code, Panel::kFloats>>(call);
}

}  // namespace

void lowbit_linear(const LowbitLinearArgs& call) {
  with_code(call.w, [&](auto code) { forward<decltype(code)>(call); });
}

void lowbit_linear_grad_x(const LowbitLinearArgs& call) {
  with_code(call.w, [&](auto code) { gradient<decltype(code)>(call); });
}

}  // namespace bitfuse::BITFUSE_ISA
