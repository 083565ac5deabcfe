#include "bind/cpu_calls.h"
#include "cpu/linear/lora_linear.h"

namespace bitfuse {
namespace {

constexpr int64_t kMaxRank = 512;

void check_rank(int64_t rank) {
  require(rank > 0 && rank <= kMaxRank, "rank", rank, "1 to " + std::to_string(kMaxRank));
}

Dropout make_dropout(double p, int64_t seed) {
  if (!(p >= 0 && p < 1)) refuse("dropout_p", std::to_string(p), "0 <= dropout_p < 1");
  return {p, static_cast<uint64_t>(seed)};
}

void lora_linear(uintptr_t x, int dtype, int64_t rows, int64_t row_stride, uintptr_t codes, uintptr_t scales,
                 int scale_kind, uintptr_t zeros, uintptr_t scale_table, uintptr_t scale_scales,
                 uintptr_t scale_offset, uintptr_t values, int code_kind, int zero_point, int64_t n,
                 int64_t k, int64_t group_size, uintptr_t bias, uintptr_t out, uintptr_t a, int a_dtype,
                 uintptr_t b, int b_dtype, int64_t rank, double scale, uintptr_t h, double dropout_p,
                 int64_t seed, uintptr_t out_scale) {
  LowbitLinearArgs call = make_linear_call(x, dtype, rows, row_stride, codes, scales, scale_kind, zeros,
                                           scale_table, scale_scales, scale_offset, values, code_kind,
                                           zero_point, n, k, group_size, bias, out, false);
  call.out_scale = address<const float>("out_scale", out_scale, 4, false);
  Adapter adapter{};
  if (rank != 0) {
    check_rank(rank);
    adapter.rank = rank;
    adapter.a_dtype = make_dtype("a_dtype", a_dtype);
    adapter.b_dtype = make_dtype("b_dtype", b_dtype);
    adapter.a = matrix<const void>("a", a, adapter.a_dtype, rank, k, k);
    adapter.b = matrix<const void>("b", b, adapter.b_dtype, n, rank, rank);
    adapter.scale = static_cast<float>(scale);
    adapter.h = matrix<float>("h", h, Dtype::kFloat32, rows, rank, rank);
    adapter.dropout = make_dropout(dropout_p, seed);
    call.adapter = &adapter;
  }
  if (rows == 0 || n == 0) return;
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(lowbit_linear)(call);
}

void lora_linear_grad_x(uintptr_t grad, int dtype, int64_t rows, int64_t row_stride, uintptr_t codes,
                        uintptr_t scales, int scale_kind, uintptr_t zeros, uintptr_t scale_table,
                        uintptr_t scale_scales, uintptr_t scale_offset, uintptr_t values, int code_kind,
                        int zero_point, int64_t n, int64_t k, int64_t group_size, uintptr_t out, uintptr_t a,
                        int a_dtype, int64_t rank, uintptr_t gb, double dropout_p, int64_t seed,
                        bool accumulate) {
  LowbitLinearArgs call = make_linear_call(grad, dtype, rows, row_stride, codes, scales, scale_kind, zeros,
                                           scale_table, scale_scales, scale_offset, values, code_kind,
                                           zero_point, n, k, group_size, 0, out, true);
  call.accumulate = accumulate;
  Adapter adapter{};
  if (rank != 0) {
    check_rank(rank);
    adapter.rank = rank;
    adapter.a_dtype = make_dtype("a_dtype", a_dtype);
    adapter.a = matrix<const void>("a", a, adapter.a_dtype, rank, k, k);
    adapter.h = matrix<float>("gb", gb, Dtype::kFloat32, rows, rank, rank);
    adapter.dropout = make_dropout(dropout_p, seed);
    call.adapter = &adapter;
  }
  if (rows == 0 || n == 0) return;
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(lowbit_linear_grad_x)(call);
}

LoraShrinkArgs make_shrink_call(uintptr_t x, int dtype, int64_t rows, int64_t row_stride, int64_t depth,
                                uintptr_t a, int a_dtype, int64_t rank, uintptr_t h, double dropout_p,
                                int64_t seed) {
  check_rank(rank);
  LoraShrinkArgs call{};
  call.dtype = make_dtype("dtype", dtype);
  call.x = matrix<const void>("x", x, call.dtype, rows, depth, row_stride);
  call.rows = rows;
  call.row_stride = row_stride;
  call.depth = depth;
  call.adapter.rank = rank;
  call.adapter.a_dtype = make_dtype("a_dtype", a_dtype);
  call.adapter.a = matrix<const void>("a", a, call.adapter.a_dtype, rank, depth, depth);
  call.adapter.h = matrix<float>("h", h, Dtype::kFloat32, rows, rank, rank);
  call.adapter.dropout = make_dropout(dropout_p, seed);
  return call;
}

LoraExpandArgs make_expand_call(uintptr_t out, int dtype, int64_t rows, int64_t outs, uintptr_t t,
                                int64_t rank, uintptr_t p, int p_dtype, bool turned, double scale,
                                double dropout_p, int64_t seed, uintptr_t out_scale, uintptr_t bias) {
  check_rank(rank);
  LoraExpandArgs call{};
  call.dtype = make_dtype("dtype", dtype);
  call.out = matrix<void>("out", out, call.dtype, rows, outs, outs);
  call.base = call.out;
  call.base_stride = outs;
  call.rows = rows;
  call.outs = outs;
  call.rank = rank;
  call.t = matrix<const float>("t", t, Dtype::kFloat32, rows, rank, rank);
  call.p_dtype = make_dtype("p_dtype", p_dtype);
  call.p = matrix<const void>("p", p, call.p_dtype, rank, outs, outs);
  call.transposed = turned;
  call.scale = static_cast<float>(scale);
  call.dropout = make_dropout(dropout_p, seed);
  call.out_scale = address<const float>("out_scale", out_scale, 4, false);
  call.bias = address<const void>("bias", bias, uintptr_t(size_of(call.dtype)), false);
  call.bias_dtype = call.dtype;
  return call;
}

void lora_shrink(uintptr_t x, int dtype, int64_t rows, int64_t row_stride, int64_t depth, uintptr_t a,
                 int a_dtype, int64_t rank, uintptr_t h, double dropout_p, int64_t seed) {
  const LoraShrinkArgs call =
      make_shrink_call(x, dtype, rows, row_stride, depth, a, a_dtype, rank, h, dropout_p, seed);
  if (rows == 0) return;
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(lora_shrink)(call);
}

void lora_expand(uintptr_t out, int dtype, int64_t rows, int64_t outs, uintptr_t t, int64_t rank, uintptr_t p,
                 int p_dtype, bool turned, double scale, double dropout_p, int64_t seed, uintptr_t out_scale,
                 uintptr_t bias) {
  const LoraExpandArgs call = make_expand_call(out, dtype, rows, outs, t, rank, p, p_dtype, turned, scale,
                                               dropout_p, seed, out_scale, bias);
  if (rows == 0 || outs == 0) return;
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(lora_expand)(call);
}

void bottleneck_adapter(uintptr_t x, int dtype, int64_t rows, int64_t row_stride, int64_t depth,
                        uintptr_t down, int down_dtype, uintptr_t down_bias, int down_bias_dtype,
                        int activation, int64_t rank, uintptr_t h, uintptr_t t, uintptr_t up, int up_dtype,
                        uintptr_t up_bias, int up_bias_dtype, bool residual, int64_t outs, uintptr_t out) {
  BottleneckArgs call{};
  call.down = make_shrink_call(x, dtype, rows, row_stride, depth, down, down_dtype, rank, h, 0, 0);
  call.bias_dtype = make_dtype("down_bias_dtype", down_bias_dtype);
  call.bias = address<const void>("down_bias", down_bias, uintptr_t(size_of(call.bias_dtype)), false);
  call.activation = make_activation(activation);
  call.t = matrix<float>("t", t, Dtype::kFloat32, rows, rank, rank);
  call.up = make_expand_call(out, dtype, rows, outs, t, rank, up, up_dtype, true, 1, 0, 0, 0, 0);
  call.up.bias_dtype = make_dtype("up_bias_dtype", up_bias_dtype);
  call.up.bias = address<const void>("up_bias", up_bias, uintptr_t(size_of(call.up.bias_dtype)), false);
  if (residual) require(outs == depth, "outs", outs, "depth = " + std::to_string(depth) + " to add x");
  call.up.base = residual ? call.down.x : nullptr;
  call.up.base_stride = row_stride;
  if (rows == 0 || outs == 0) return;
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(bottleneck_adapter)(call);
}

void lora_times(uintptr_t y, int dtype, int64_t rows, int64_t row_stride, int64_t depth, uintptr_t b,
                int b_dtype, int64_t rank, double scale, uintptr_t out) {
  check_rank(rank);
  LoraTimesArgs call{};
  call.dtype = make_dtype("dtype", dtype);
  call.y = matrix<const void>("y", y, call.dtype, rows, depth, row_stride);
  call.rows = rows;
  call.row_stride = row_stride;
  require(depth > 0, "depth", depth, "1 or more");
  call.depth = depth;
  call.rank = rank;
  call.b_dtype = make_dtype("b_dtype", b_dtype);
  call.b = matrix<const void>("b", b, call.b_dtype, depth, rank, rank);
  call.scale = static_cast<float>(scale);
  call.out = matrix<float>("out", out, Dtype::kFloat32, rows, rank, rank);
  if (rows == 0) return;
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(lora_times)(call);
}

void lora_outer(uintptr_t t, int64_t rank, uintptr_t x, int dtype, int64_t rows, int64_t row_stride,
                int64_t columns, double dropout_p, int64_t seed, double scale, uintptr_t out, int out_dtype,
                bool turned) {
  check_rank(rank);
  LoraOuterArgs call{};
  call.dtype = make_dtype("dtype", dtype);
  call.x = matrix<const void>("x", x, call.dtype, rows, columns, row_stride);
  call.t = matrix<const float>("t", t, Dtype::kFloat32, rows, rank, rank);
  call.rows = rows;
  call.row_stride = row_stride;
  call.columns = columns;
  call.rank = rank;
  call.dropout = make_dropout(dropout_p, seed);
  call.scale = static_cast<float>(scale);
  call.out_dtype = make_dtype("out_dtype", out_dtype);
  call.out = matrix<void>("out", out, call.out_dtype, rank, columns, columns);
  call.transposed = turned;
  if (columns == 0) return;
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(lora_outer)(call);
}

}  // namespace

void bind_lora_linear(py::module_& module) {
  module.def("lora_linear", lora_linear);
  module.def("lora_linear_grad_x", lora_linear_grad_x);
  module.def("lora_shrink", lora_shrink);
  module.def("lora_expand", lora_expand);
  module.def("bottleneck_adapter", bottleneck_adapter);
  module.def("lora_times", lora_times);
  module.def("lora_outer", lora_outer);
}

}  // namespace bitfuse
