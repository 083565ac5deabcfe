// The integers of a product with a few-bit W, checked: shared by the bindings of the ops that are built on
// one.
#pragma once

#include "bind_cpu.h"
#include "cpu/lowbit_linear.h"

namespace bitfuse {

LinearCall make_linear_call(uintptr_t x, int dtype, int64_t rows, int64_t row_stride, uintptr_t codes,
                            uintptr_t scales, int scale_kind, uintptr_t zeros, uintptr_t scale_table,
                            uintptr_t scale_scales, uintptr_t scale_offset, uintptr_t values, int code_kind,
                            int zero_point, int64_t n, int64_t k, int64_t group_size, uintptr_t bias,
                            uintptr_t out, bool gradient);

}  // namespace bitfuse
