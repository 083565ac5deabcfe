#include "cpu/linear/few_rows_narrow.h"

#include "cpu/linear/few_rows.h"

namespace bitfuse::BITFUSE_ISA {
namespace {

template <bool Zeros>
using Code2 = TableCode<2, Zeros>;
template <bool Zeros>
using Code3 = TableCode<3, Zeros>;

}  // namespace

void few_rows_narrow(const LowbitLinearArgs& call) {
  bits_of(call.w.code_kind) == 2 ? few_rows_of<Code2>(call) : few_rows_of<Code3>(call);
}

}  // namespace bitfuse::BITFUSE_ISA
