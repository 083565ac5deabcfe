#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "bind/cpu_calls.h"
#include "cpu/attention/attention.h"

namespace bitfuse {
namespace {

constexpr int64_t kMostBound = int64_t(1) << 40;  // of a window, so that positions never overflow

using View = std::array<int64_t, 4>;  // address; strides of batch, row and head

// [batch, rows, heads, dim]
HeadsView heads_view(const char* name, const View& given, Dtype dtype, int64_t batch, int64_t rows,
                     int64_t heads, int64_t dim) {
  const int64_t counts[] = {batch, rows, heads};
  int64_t last = dim;  // past the furthest element
  for (int i = 0; i < 3; ++i) {
    require(counts[i] >= 0, name, counts[i], "sizes of 0 or more");
    require(given[i + 1] >= 0, name, given[i + 1], "strides of 0 or more");
    int64_t reach;
    if (__builtin_mul_overflow(counts[i], given[i + 1], &reach) || __builtin_add_overflow(last, reach, &last))
      refuse(name, "larger than memory", "strides whose reach is below 2^63");
  }
  check_bytes(name, {last, size_of(dtype)});
  check_bytes(name, {batch, rows, heads, dim, 16});
  const bool any = batch > 0 && rows > 0 && heads > 0;
  return {address<const void>(name, uintptr_t(given[0]), uintptr_t(size_of(dtype)), any), given[1], given[2],
          given[3]};
}

void check_sequences(const char* name, const int32_t* offsets, int64_t batch, int64_t total) {
  for (int64_t b = 0; b <= batch; ++b)
    if (offsets[b] < 0 || offsets[b] > total || (b && offsets[b] < offsets[b - 1]) || (!b && offsets[0]))
      refuse(name, std::to_string(offsets[b]) + " at " + std::to_string(b),
             "0 to " + std::to_string(total) + ", not decreasing");
  require(offsets[batch] == total, name, offsets[batch], "an end at " + std::to_string(total));
}

// Fills `call`, and `sequences`, which it points to.
void make_call(AttentionCall& call, std::vector<AttentionSequence>& sequences,
               const std::array<int64_t, 9>& sizes, const View& q, const View& k, const View& v,
               const View& prefix_k, const View& prefix_v, uintptr_t cu_q, uintptr_t cu_k, double scale,
               double softcap, int64_t left, int64_t right, bool top_left, double dropout_p, int64_t seed,
               const std::array<int64_t, 6>& bias, uintptr_t alibi, bool alibi_batched, uintptr_t sinks) {
  call.dtype = make_dtype("dtype", int(sizes[0]));
  call.batch = sizes[1];
  call.heads = sizes[2];
  call.kv_heads = sizes[3];
  call.dim = sizes[4];
  call.dim_v = sizes[5];
  call.rows = sizes[6];
  call.keys = sizes[7];
  call.prefix = sizes[8];
  require(call.batch >= 0, "batch", call.batch, "0 or more");
  require(call.kv_heads > 0, "kv_heads", call.kv_heads, "1 or more");
  require(call.heads >= 0 && call.heads % call.kv_heads == 0, "heads", call.heads,
          "a multiple of " + std::to_string(call.kv_heads));
  const std::string dims = "1 to " + std::to_string(kMaxHeadDim);
  require(call.dim > 0 && call.dim <= kMaxHeadDim, "dim", call.dim, dims);
  require(call.dim_v > 0 && call.dim_v <= kMaxHeadDim, "dim_v", call.dim_v, dims);
  require(call.rows >= 0 && call.rows < kMostBound, "rows", call.rows, "0 to 2^40");
  require(call.keys >= 0 && call.keys < kMostBound, "keys", call.keys, "0 to 2^40");
  require(call.prefix >= 0 && call.prefix < kMostBound, "prefix", call.prefix, "0 to 2^40");
  check_bytes("rows", {call.batch, call.rows, call.heads, kMaxHeadDim, 8});

  call.packed = cu_q != 0;
  const int64_t outer = call.packed ? 1 : call.batch;
  const bool some_q = call.heads > 0;
  call.q = heads_view("q", q, call.dtype, some_q ? outer : 0, call.rows, call.heads, call.dim);
  call.k = heads_view("k", k, call.dtype, outer, call.keys, call.kv_heads, call.dim);
  call.v = heads_view("v", v, call.dtype, outer, call.keys, call.kv_heads, call.dim_v);
  if (call.prefix) {
    call.prefix_k =
        heads_view("prefix_k", prefix_k, call.dtype, call.batch, call.prefix, call.kv_heads, call.dim);
    call.prefix_v =
        heads_view("prefix_v", prefix_v, call.dtype, call.batch, call.prefix, call.kv_heads, call.dim_v);
  }
  sequences.resize(size_t(call.batch));
  if (call.packed) {
    const auto* of_q = address<const int32_t>("cu_seqlens_q", cu_q, 4);
    const auto* of_k = address<const int32_t>("cu_seqlens_k", cu_k, 4);
    // a copy: what is checked is what is used, whoever writes to the tensors meanwhile
    const std::vector<int32_t> own_q(of_q, of_q + call.batch + 1), own_k(of_k, of_k + call.batch + 1);
    check_sequences("cu_seqlens_q", own_q.data(), call.batch, call.rows);
    check_sequences("cu_seqlens_k", own_k.data(), call.batch, call.keys);
    for (size_t b = 0; b < sequences.size(); ++b)
      sequences[b] = {own_q[b], own_q[b + 1] - own_q[b], own_k[b], own_k[b + 1] - own_k[b]};
  } else {
    for (auto& s : sequences) s = {0, call.rows, 0, call.keys};
  }
  call.sequences = sequences.data();

  if (!(dropout_p >= 0 && dropout_p < 1))
    refuse("dropout_p", std::to_string(dropout_p), "0 <= dropout_p < 1");
  if (!(softcap >= 0)) refuse("softcap", std::to_string(softcap), "0 or more");
  call.scale = float(scale);
  call.softcap = float(softcap);
  call.left = left < kMostBound ? left : kMostBound;
  call.right = right < kMostBound ? right : kMostBound;
  call.top_left = top_left;
  call.dropout = {dropout_p, static_cast<uint64_t>(seed)};
  if (bias[0]) {
    require(!call.packed, "bias", bias[0], "none with packed sequences");
    call.bias.mask = bias[1] == 3;
    call.bias.dtype = call.bias.mask ? Dtype::kFloat32 : make_dtype("bias dtype", int(bias[1]));
    const int64_t size = call.bias.mask ? 1 : size_of(call.bias.dtype);
    const int64_t counts[] = {call.batch, call.heads, call.rows, call.keys};
    for (int i = 0; i < 4; ++i) {
      require(bias[size_t(i) + 2] >= 0, "bias", bias[size_t(i) + 2], "strides of 0 or more");
      check_bytes("bias", {counts[i], bias[size_t(i) + 2], 16});  // 16: of four such, the sum too
    }
    call.bias.data = address<const void>("bias", uintptr_t(bias[0]), uintptr_t(size));
    call.bias.batch = bias[2];
    call.bias.head = bias[3];
    call.bias.row = bias[4];
    call.bias.column = bias[5];
  }
  call.alibi = address<const float>("alibi_slopes", alibi, 4, false);
  call.alibi_batch = alibi_batched ? call.heads : 0;
  call.sinks = address<const float>("sinks", sinks, 4, false);
}

void forward(const std::array<int64_t, 9>& sizes, const View& q, const View& k, const View& v,
             const View& prefix_k, const View& prefix_v, uintptr_t cu_q, uintptr_t cu_k, double scale,
             double softcap, int64_t left, int64_t right, bool top_left, double dropout_p, int64_t seed,
             const std::array<int64_t, 6>& bias, uintptr_t alibi, bool alibi_batched, uintptr_t sinks,
             uintptr_t out, uintptr_t lse) {
  AttentionCall call{};
  std::vector<AttentionSequence> sequences;
  make_call(call, sequences, sizes, q, k, v, prefix_k, prefix_v, cu_q, cu_k, scale, softcap, left, right,
            top_left, dropout_p, seed, bias, alibi, alibi_batched, sinks);
  const bool any = call.batch > 0 && call.rows > 0 && call.heads > 0;
  call.out = address<void>("out", out, uintptr_t(size_of(call.dtype)), any);
  call.lse = address<float>("lse", lse, 4, any);
  if (!any) return;
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(attention)(call);
}

// grads: addresses of the gradients of q, k, v, bias, sinks, prefix_k and prefix_v; 0 for one not wanted.
void backward(const std::array<int64_t, 9>& sizes, const View& q, const View& k, const View& v,
              const View& prefix_k, const View& prefix_v, uintptr_t cu_q, uintptr_t cu_k, double scale,
              double softcap, int64_t left, int64_t right, bool top_left, double dropout_p, int64_t seed,
              const std::array<int64_t, 6>& bias, uintptr_t alibi, bool alibi_batched, uintptr_t sinks,
              const View& grad, const View& out, uintptr_t lse, uintptr_t grad_lse,
              const std::array<int64_t, 4>& bias_sizes, const std::array<uintptr_t, 7>& grads) {
  AttentionBackwardCall call{};
  std::vector<AttentionSequence> sequences;
  make_call(call, sequences, sizes, q, k, v, prefix_k, prefix_v, cu_q, cu_k, scale, softcap, left, right,
            top_left, dropout_p, seed, bias, alibi, alibi_batched, sinks);
  const bool any = call.batch > 0 && call.rows > 0 && call.heads > 0;
  const int64_t outer = call.packed ? 1 : call.batch;
  call.grad = heads_view("grad", grad, call.dtype, outer, call.rows, call.heads, call.dim_v);
  call.output = heads_view("out", out, call.dtype, outer, call.rows, call.heads, call.dim_v);
  call.lse = address<float>("lse", lse, 4, any);
  call.grad_lse = address<const float>("grad_lse", grad_lse, 4, false);
  const auto size = uintptr_t(size_of(call.dtype));
  call.grad_q = address<void>("grad_q", grads[0], size, false);
  call.grad_k = address<void>("grad_k", grads[1], size, false);
  call.grad_v = address<void>("grad_v", grads[2], size, false);
  if (grads[3]) {
    require(call.bias.data && !call.bias.mask, "grad_bias", int64_t(grads[3]), "none without a float bias");
    const int64_t full[] = {call.batch, call.heads, call.rows, call.keys};
    for (size_t i = 0; i < 4; ++i) {
      require(bias_sizes[i] == full[i] || bias_sizes[i] == 1, "bias_sizes", bias_sizes[i],
              "1 or " + std::to_string(full[i]));
      call.bias_sizes[i] = bias_sizes[i];
    }
    check_bytes("grad_bias", {bias_sizes[0], bias_sizes[1], bias_sizes[2], bias_sizes[3], 4});
    call.grad_bias = address<void>("grad_bias", grads[3], uintptr_t(size_of(call.bias.dtype)));
  }
  if (grads[4]) {
    require(call.sinks, "grad_sinks", int64_t(grads[4]), "none without sinks");
    call.grad_sinks = address<float>("grad_sinks", grads[4], 4);
  }
  call.grad_prefix_k = address<void>("grad_prefix_k", grads[5], size, false);
  call.grad_prefix_v = address<void>("grad_prefix_v", grads[6], size, false);
  if (!any) return;
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(attention_backward)(call);
}

}  // namespace

void bind_attention(py::module_& module) {
  module.def("attention", forward);
  module.def("attention_backward", backward);
}

}  // namespace bitfuse
