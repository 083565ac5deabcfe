// AttentionArgs from tensors and from the named tuple of python/bitfuse/ops/attention/attention_args.py: the
// same for the CPU and for CUDA.
#pragma once

#include "bind/heads.h"
#include "common/attention.h"

namespace bitfuse {

struct AttentionNames {
  Name softmax_scale{"softmax_scale"}, left{"left"}, right{"right"}, top_left{"top_left"}, softcap{"softcap"},
      dropout_p{"dropout_p"}, seed{"seed"}, bias{"bias"}, alibi_slopes{"alibi_slopes"}, sinks{"sinks"},
      prefix_k{"prefix_k"}, prefix_v{"prefix_v"}, cu_seqlens_q{"cu_seqlens_q"}, cu_seqlens_k{"cu_seqlens_k"},
      max_seqlen_q{"max_seqlen_q"}, max_seqlen_k{"max_seqlen_k"};
};

inline AttentionBias attention_bias(const Tensor& t, const Tensor& like, const AttentionArgs& args) {
  require(!args.packed, "bias", 1, "none with packed sequences");
  require_device("bias", t, like.device);
  AttentionBias bias;
  bias.mask = t.dtype == Dtype::kBool;
  if (!bias.mask) require_float("bias", t);
  bias.dtype = bias.mask ? Dtype::kFloat32 : t.dtype;
  bias.data = t.data;
  const int64_t sizes[] = {args.batch, args.heads, args.rows, args.keys};
  int64_t* const strides[] = {&bias.batch, &bias.head, &bias.row, &bias.column};
  for (int i = 0; i < 4; ++i) {
    if (t.dims != 4 || (t.shape[i] != 1 && t.shape[i] != sizes[i]))
      refuse("bias", "of shape " + shape_of(t), text_of(sizes, 4) + ", or 1");
    *strides[i] = t.shape[i] == 1 ? 0 : t.strides[i];
    check_bytes("bias", {sizes[i], *strides[i], 16});  // 16: of four such, the sum too
  }
  return bias;
}

// Everything but what the device decides: values of offsets, where `out` and `lse` go.
inline AttentionArgs read_attention(const Tensor& q, const Tensor& k, const Tensor& v, py::handle a) {
  static const AttentionNames& names = *new AttentionNames;
  AttentionArgs args;
  require_float("q", q);
  args.dtype = q.dtype;
  const std::optional<Tensor> cu_q = names.cu_seqlens_q.tensor_or_none(a);
  const std::optional<Tensor> cu_k = names.cu_seqlens_k.tensor_or_none(a);
  args.packed = cu_q.has_value();
  const int dims = args.packed ? 3 : 4;
  const std::pair<const char*, const Tensor*> three[] = {{"q", &q}, {"k", &k}, {"v", &v}};
  for (auto [name, t] : three)
    if (t->dims != dims) refuse(name, "of shape " + shape_of(*t), std::to_string(dims) + " dimensions");
  args.rows = q.shape[dims - 3];
  args.keys = k.shape[dims - 3];
  args.heads = q.shape[dims - 2];
  args.kv_heads = k.shape[dims - 2];
  args.dim = q.shape[dims - 1];
  args.dim_v = v.shape[dims - 1];
  args.max_rows = args.rows;
  args.max_keys = args.keys;
  args.batch = q.shape[0];
  if (args.packed) {
    if (!cu_k) refuse("cu_seqlens_k", "missing", "as cu_seqlens_q");
    require_device("cu_seqlens_q", *cu_q, q.device);
    require_device("cu_seqlens_k", *cu_k, q.device);
    args.batch = cu_q->dims == 1 ? cu_q->shape[0] - 1 : -1;
    args.cu_seqlens_q = dense<const int32_t>("cu_seqlens_q", *cu_q, Dtype::kInt32, {args.batch + 1});
    args.cu_seqlens_k = dense<const int32_t>("cu_seqlens_k", *cu_k, Dtype::kInt32, {args.batch + 1});
    args.max_rows = names.max_seqlen_q.integer(a);
    args.max_keys = names.max_seqlen_k.integer(a);
  }
  require(args.batch >= 0, "batch", args.batch, "0 or more");
  require(args.kv_heads > 0, "kv_heads", args.kv_heads, "1 or more");
  require(args.heads % args.kv_heads == 0, "heads", args.heads,
          "a multiple of " + std::to_string(args.kv_heads));
  require_head_dim("dim", args.dim);
  require_head_dim("dim_v", args.dim_v);
  require_tokens("rows", args.rows);
  require_tokens("keys", args.keys);
  check_bytes("rows", {args.batch, args.rows, args.heads, kMaxHeadDim, 8});
  const int64_t outer = args.packed ? 1 : args.batch;
  args.q = head_rows("q", q, q, outer, args.rows, args.heads, args.dim);
  args.k = head_rows("k", k, q, outer, args.keys, args.kv_heads, args.dim);
  args.v = head_rows("v", v, q, outer, args.keys, args.kv_heads, args.dim_v);
  const std::optional<Tensor> prefix_k = names.prefix_k.tensor_or_none(a);
  const std::optional<Tensor> prefix_v = names.prefix_v.tensor_or_none(a);
  if (prefix_k || prefix_v) {
    if (!prefix_k || !prefix_v) refuse(prefix_k ? "prefix_v" : "prefix_k", "missing", "both or neither");
    args.prefix = prefix_k->dims == 4 ? prefix_k->shape[1] : 0;
    require_tokens("prefix", args.prefix);
    args.prefix_k = head_rows("prefix_k", *prefix_k, q, args.batch, args.prefix, args.kv_heads, args.dim);
    args.prefix_v = head_rows("prefix_v", *prefix_v, q, args.batch, args.prefix, args.kv_heads, args.dim_v);
  }
  const double softcap = names.softcap.number(a);
  if (!(softcap >= 0)) refuse("softcap", std::to_string(softcap), "0 or more");
  args.scale = static_cast<float>(names.softmax_scale.number(a));
  args.softcap = static_cast<float>(softcap);
  args.left = window_bound(names.left.integer(a));
  args.right = window_bound(names.right.integer(a));
  args.top_left = names.top_left.flag(a);
  args.dropout.p = names.dropout_p.number(a);
  if (!(args.dropout.p >= 0 && args.dropout.p < 1))
    refuse("dropout_p", std::to_string(args.dropout.p), "0 <= dropout_p < 1");
  if (args.dropout.p > 0) {
    const py::object seed = py::reinterpret_steal<py::object>(PyNumber_Long(names.seed.of(a).ptr()));
    if (!seed) throw py::error_already_set();
    args.dropout.seed = static_cast<uint64_t>(seed.cast<int64_t>());
  }
  if (const auto bias = names.bias.tensor_or_none(a)) args.bias = attention_bias(*bias, q, args);
  if (const auto slopes = names.alibi_slopes.tensor_or_none(a)) {
    const bool batched = slopes->dims == 2;
    args.alibi = batched ? floats("alibi_slopes", *slopes, q, {args.batch, args.heads})
                         : floats("alibi_slopes", *slopes, q, {args.heads});
    args.alibi_batch = batched ? args.heads : 0;
  }
  if (const auto sinks = names.sinks.tensor_or_none(a)) args.sinks = floats("sinks", *sinks, q, {args.heads});
  return args;
}

// Whether there is a query.
inline bool any_rows(const AttentionArgs& args) { return args.batch > 0 && args.rows > 0 && args.heads > 0; }

// lse, of the shape that the call's has.
inline float* attention_lse(const char* name, const Tensor& t, const Tensor& q, const AttentionArgs& args) {
  require_device(name, t, q.device);
  return args.packed ? dense<float>(name, t, Dtype::kFloat32, {args.heads, args.rows})
                     : dense<float>(name, t, Dtype::kFloat32, {args.batch, args.heads, args.rows});
}

// The output, dense.
inline void* attention_out(const char* name, const Tensor& t, const Tensor& q, const AttentionArgs& args) {
  require_device(name, t, q.device);
  return args.packed ? dense<void>(name, t, args.dtype, {args.rows, args.heads, args.dim_v})
                     : dense<void>(name, t, args.dtype, {args.batch, args.rows, args.heads, args.dim_v});
}

}  // namespace bitfuse
