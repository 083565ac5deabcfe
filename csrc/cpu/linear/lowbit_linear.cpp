// lowbit_linear on the CPU: y = x W^T + b and its gradient x' = y' W. W is decoded in registers and caches
// only.
//
// Few rows of x: bound by reading W (few_rows.h). More: bound by multiply-adds (panels.h). Each output is
// summed by one thread in an order that depends on K, N, group_size and the path, not on the threads: the
// same bits from run to run.
#include "cpu/linear/few_rows.h"
#include "cpu/linear/few_rows_narrow.h"
#include "cpu/linear/panels.h"

namespace bitfuse::BITFUSE_ISA {
namespace {

constexpr int64_t kCodeRows = 96;    // x rows up to which tiles decode codes themselves, where that is cheap
constexpr int64_t kShortGroup = 32;  // below it a group's sum is too short to pay for its scaling

template <bool Zeros>
using Code4 = TableCode<4, Zeros>;

void forward_few(const LowbitLinearArgs& call) {
  if (call.w.code_kind == CodeKind::kE4m3) return few_rows_e4m3(call);
  switch (bits_of(call.w.code_kind)) {
    case 8:
      return few_rows_of<ByteCode>(call);
    case 4:
      return few_rows_of<Code4>(call);
    default:
      return few_rows_narrow(call);
  }
}

template <class Code>
void forward(const LowbitLinearArgs& call) {
  const bool long_groups = call.w.group_size >= kShortGroup;
#if BITFUSE_PAIRS
  if (call.dtype == Dtype::kBfloat16) {
    if (!long_groups || call.w.offsets || !values_are_bfloat16(call.w))
      return multiply<Forward<Code, Panel::kRoundedPairs>>(call);
    if (Code::kPairsInTiles && call.rows <= kCodeRows)
      return multiply<Forward<Code, Panel::kCodePairs>>(call);
    return multiply<Forward<Code, Panel::kExactPairs>>(call);
  }
#endif
  if (Code::kFloatsInTiles && long_groups && !call.w.offsets && call.rows <= kCodeRows)
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
  if (call.rows <= kFewRows) return forward_few(call);
  with_code(call.w, [&](auto code) { forward<decltype(code)>(call); });
}

void lowbit_linear_grad_x(const LowbitLinearArgs& call) {
  with_code(call.w, [&](auto code) { gradient<decltype(code)>(call); });
}

}  // namespace bitfuse::BITFUSE_ISA
