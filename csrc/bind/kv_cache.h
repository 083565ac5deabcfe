// KvCache, Rotary and the problems of a cache from tensors and from the named tuples of
// python/bitfuse/ops/attention/kv_cache.py: the same for the CPU and for CUDA.
#pragma once

#include <cmath>

#include "bind/heads.h"
#include "common/kv_cache.h"
#include "common/rotary.h"

namespace bitfuse {

constexpr bool is_power_of_two(int64_t value) { return value > 0 && (value & (value - 1)) == 0; }

inline CacheFormat cache_format(py::handle name) {
  if (PyUnicode_Check(name.ptr()))
    for (int i = 0; i < 4; ++i)
      if (PyUnicode_CompareWithASCIIString(name.ptr(), kCacheFormats[i]) == 0)
        return static_cast<CacheFormat>(i);
  refuse("format", py::repr(name).cast<std::string>(), "'none', 'fp8', 'int8' or 'int4'");
}

struct CacheNames {
  Name k{"k"}, v{"v"}, k_scales{"k_scales"}, k_offsets{"k_offsets"}, v_scales{"v_scales"},
      v_offsets{"v_offsets"}, k_tail{"k_tail"}, v_tail{"v_tail"}, block_table{"block_table"},
      format{"format"}, group_size{"group_size"}, channel_group{"channel_group"};
};

// K or V of a cache: [pages, page_size, kv_heads, width].
inline CacheRows cache_rows(const char* name, const Tensor& t, Dtype dtype, int device) {
  require_dtype(name, t, dtype);
  require_device(name, t, device);
  if (!has_dense_rows(t)) refuse(name, "of strides " + text_of(t.strides, t.dims), "a dense last dimension");
  const int64_t unit = size_of(dtype);
  check_bytes(name, {t.shape[0], t.shape[1], t.shape[2], kMaxHeadDim, 8});
  return {static_cast<char*>(t.data), t.strides[0] * unit, t.strides[1] * unit, t.strides[2] * unit};
}

// What a cache of codes has beside them; tails are not wanted of a cache that is made at once.
inline void read_codes(KvCache& cache, py::handle given, const CacheNames& names, int device, bool tails) {
  cache.group_size = names.group_size.integer(given);
  cache.channel_group = names.channel_group.integer(given);
  const int64_t size = cache.group_size, channels = cache.channel_group;
  require(is_power_of_two(size) && cache.page_size % size == 0, "group_size", size,
          "a power of two that divides " + std::to_string(cache.page_size));
  require(size <= (1 << 20), "group_size", size, "at most 2^20");
  require(channels >= 32 && channels % 32 == 0, "channel_group", channels, "a multiple of 32");
  require(cache.dim % 8 == 0, "dim", cache.dim, "a multiple of 8");
  require(cache.dim_v % 8 == 0, "dim_v", cache.dim_v, "a multiple of 8");
  auto array = [&](const Name& name, Dtype dtype, std::initializer_list<int64_t> shape) -> void* {
    const Tensor t = name.tensor(given);
    require_device(name.text(), t, device);
    return dense<char>(name.text(), t, dtype, shape);
  };
  auto halves = [&](const Name& name, int64_t rows, int64_t columns) {
    return static_cast<uint16_t*>(array(name, Dtype::kFloat16, {cache.pages, rows, cache.kv_heads, columns}));
  };
  cache.k_scales = halves(names.k_scales, cache.page_size / size, cache.dim);
  cache.k_offsets = halves(names.k_offsets, cache.page_size / size, cache.dim);
  cache.v_scales = halves(names.v_scales, cache.page_size, cache.value_groups());
  cache.v_offsets = halves(names.v_offsets, cache.page_size, cache.value_groups());
  if (!tails) return;
  check_bytes("k_tail", {cache.batch, size, cache.kv_heads, kMaxHeadDim, 16});
  cache.k_tail = array(names.k_tail, cache.dtype, {cache.batch, 2 * size, cache.kv_heads, cache.dim});
  cache.v_tail = array(names.v_tail, cache.dtype, {cache.batch, 2 * size, cache.kv_heads, cache.dim_v});
}

// A cache of `batch` sequences, met by tensors like another; values of the block table are still to be looked
// at.
inline KvCache read_cache(py::handle given, const Tensor& like, int64_t batch, bool tails = true) {
  static const CacheNames& names = *new CacheNames;
  KvCache cache;
  cache.format = cache_format(names.format.of(given));
  require_float("dtype", like);
  cache.dtype = like.dtype;
  cache.batch = batch;
  const Tensor k = names.k.tensor(given, "k_cache"), v = names.v.tensor(given, "v_cache");
  const std::pair<const char*, const Tensor*> both[] = {{"k_cache", &k}, {"v_cache", &v}};
  for (auto [name, t] : both)
    if (t->dims != 4 || t->shape[0] != k.shape[0] || t->shape[1] != k.shape[1] || t->shape[2] != k.shape[2])
      refuse(name, "of shape " + shape_of(*t),
             "[pages, page_size, kv_heads, head_dim], the same but for the last");
  const bool codes = has_codes(cache.format);
  const int64_t channels = codes ? 8 / bits_of(cache.format) : 1;  // of an element
  cache.pages = k.shape[0];
  cache.page_size = k.shape[1];
  cache.kv_heads = k.shape[2];
  for (auto [name, t] : both)
    require(t->shape[3] <= kMaxHeadDim, name, t->shape[3], "a head_dim of 512 or less");
  cache.dim = k.shape[3] * channels;
  cache.dim_v = v.shape[3] * channels;
  require_tokens("batch", cache.batch);
  require_tokens("pages", cache.pages);
  require_tokens("page_size", cache.page_size);
  require_tokens("kv_heads", cache.kv_heads, 1);
  require_head_dim("dim", cache.dim);
  require_head_dim("dim_v", cache.dim_v);
  const Dtype stored = codes ? Dtype::kUint8 : cache.format == CacheFormat::kFp8 ? Dtype::kE4m3 : cache.dtype;
  cache.k = cache_rows("k_cache", k, stored, like.device);
  cache.v = cache_rows("v_cache", v, stored, like.device);
  if (codes) {
    read_codes(cache, given, names, like.device, tails);
  } else if (cache.format == CacheFormat::kFp8) {
    if (const auto t = names.k_scales.tensor_or_none(given))
      cache.k_head_scales = floats("k_scales", *t, like, {cache.kv_heads});
    if (const auto t = names.v_scales.tensor_or_none(given))
      cache.v_head_scales = floats("v_scales", *t, like, {cache.kv_heads});
  }
  if (const auto table = names.block_table.tensor_or_none(given)) {
    require_device("block_table", *table, like.device);
    cache.max_pages = table->dims == 2 ? table->shape[1] : -1;
    require_tokens("max_pages", cache.max_pages);
    const int32_t* from =
        dense<const int32_t>("block_table", *table, Dtype::kInt32, {batch, cache.max_pages});
    static const int32_t kNoPage = -1;
    cache.table = from ? from : &kNoPage;  // of no entry: still a table
    check_bytes("block_table", {batch, cache.max_pages, cache.page_size, 4});
  } else {
    require(cache.pages == batch, "pages", cache.pages, std::to_string(batch));
  }
  return cache;
}

struct RotaryNames {
  Name cos{"cos"}, sin{"sin"}, positions{"positions"}, interleaved{"interleaved"};
};

// Of `tokens` tokens of each sequence; values of the positions are still to be looked at.
inline Rotary read_rotary(py::handle given, const Tensor& like, int64_t batch, int64_t tokens, int64_t dim,
                          bool inverse = false) {
  static const RotaryNames& names = *new RotaryNames;
  Rotary rotary;
  const auto cos = names.cos.tensor_or_none(given, "rotary_cos");
  if (!cos) return rotary;
  const Tensor sin = names.sin.tensor(given, "rotary_sin");
  require_float("rotary_cos", *cos);
  require_device("rotary_cos", *cos, like.device);
  require_device("rotary_sin", sin, like.device);
  rotary.dtype = cos->dtype;
  rotary.rows = cos->dims == 2 ? cos->shape[0] : -1;
  rotary.half = cos->dims == 2 ? cos->shape[1] : 0;
  require(rotary.half > 0 && 2 * rotary.half <= dim, "rotary half", rotary.half,
          "1 to " + std::to_string(dim / 2));
  require_tokens("rotary rows", rotary.rows);
  rotary.cos = dense<const void>("rotary_cos", *cos, rotary.dtype, {rotary.rows, rotary.half});
  rotary.sin = dense<const void>("rotary_sin", sin, rotary.dtype, {rotary.rows, rotary.half});
  static const float kNothing = 0;
  if (!rotary.cos) rotary.cos = rotary.sin = &kNothing;  // no rows: still a rotation
  if (const auto positions = names.positions.tensor_or_none(given)) {
    const int64_t rows = positions->dims == 2 ? positions->shape[0] : -1;
    require(rows == 1 || rows == batch, "rows of positions", rows, "1 or the batch");
    require_device("positions", *positions, like.device);
    rotary.positions = dense<const int32_t>("positions", *positions, Dtype::kInt32, {rows, tokens});
    rotary.positions_batch = rows == 1 ? 0 : tokens;
  }
  rotary.interleaved = names.interleaved.flag(given);
  rotary.inverse = inverse;
  return rotary;
}

inline const int32_t* read_seqlens(py::handle given, const Tensor& like, int64_t batch) {
  const Tensor t = read("cache_seqlens", given);
  require_device("cache_seqlens", t, like.device);
  return dense<const int32_t>("cache_seqlens", t, Dtype::kInt32, {batch});
}

// New keys and values, [batch, tokens, kv_heads, dim] and [..., dim_v], of a cache that has been read.
inline void read_new(AppendArgs& args, const Tensor& k, const Tensor& v, const Tensor& like) {
  args.tokens = k.dims == 4 ? k.shape[1] : -1;
  require_tokens("new tokens", args.tokens);
  const KvCache& cache = args.cache;
  args.k = head_rows("k", k, like, cache.batch, args.tokens, cache.kv_heads, cache.dim);
  args.v = head_rows("v", v, like, cache.batch, args.tokens, cache.kv_heads, cache.dim_v);
}

struct DecodeNames {
  Name softmax_scale{"softmax_scale"}, left{"left"}, right{"right"}, softcap{"softcap"},
      tree_mask{"tree_mask"}, alibi_slopes{"alibi_slopes"}, sinks{"sinks"};
};

// Everything but what the device decides: values of lengths, pages and positions.
inline DecodeArgs read_decode(const Tensor& q, py::handle k_, py::handle v_, py::handle cache,
                              py::handle seqlens, py::handle rotary, py::handle a, py::handle out_,
                              py::handle lse_) {
  static const DecodeNames& names = *new DecodeNames;
  DecodeArgs args;
  if (q.dims != 4) refuse("q", "of shape " + shape_of(q), "[batch, seq, heads, head_dim]");
  const int64_t batch = q.shape[0];
  args.cache = read_cache(cache, q, batch);
  args.seqlens = read_seqlens(seqlens, q, batch);
  args.queries = q.shape[1];
  args.heads = q.shape[2];
  require_tokens("queries", args.queries);
  require(args.heads % args.cache.kv_heads == 0, "heads", args.heads,
          "a multiple of " + std::to_string(args.cache.kv_heads));
  check_bytes("q", {batch, args.queries, args.heads, kMaxHeadDim, 64});
  check_bytes("tree_mask", {batch, args.queries, args.queries});
  args.q = head_rows("q", q, q, batch, args.queries, args.heads, args.cache.dim);
  if (k_.is_none() != v_.is_none()) refuse("v", "given or not", "as k");
  if (!k_.is_none()) read_new(args, read("k", k_), read("v", v_), q);
  args.rotary = read_rotary(rotary, q, batch, args.queries, args.cache.dim);
  require(!args.rotary.positions || !args.tokens || args.tokens == args.queries, "new tokens", args.tokens,
          std::to_string(args.queries));
  const double softcap = names.softcap.number(a);
  if (!(softcap >= 0)) refuse("softcap", std::to_string(softcap), "0 or more");
  args.scale = static_cast<float>(names.softmax_scale.number(a));
  args.softcap = static_cast<float>(softcap);
  args.left = window_bound(names.left.integer(a));
  args.right = window_bound(names.right.integer(a));
  if (const auto tree = names.tree_mask.tensor_or_none(a)) {
    const int64_t rows = tree->dims == 3 ? tree->shape[0] : -1;
    require(rows == 1 || rows == batch, "tree_mask", rows, "1 or the batch");
    require_device("tree_mask", *tree, q.device);
    args.tree = dense<const uint8_t>("tree_mask", *tree, Dtype::kBool, {rows, args.queries, args.queries});
    args.tree_batch = rows == 1 ? 0 : args.queries * args.queries;
  }
  if (const auto slopes = names.alibi_slopes.tensor_or_none(a)) {
    const bool batched = slopes->dims == 2;
    args.alibi = batched ? floats("alibi_slopes", *slopes, q, {batch, args.heads})
                         : floats("alibi_slopes", *slopes, q, {args.heads});
    args.alibi_batch = batched ? args.heads : 0;
  }
  if (const auto sinks = names.sinks.tensor_or_none(a)) args.sinks = floats("sinks", *sinks, q, {args.heads});
  const Tensor out = read("out", out_), lse = read("lse", lse_);
  require_device("out", out, q.device);
  require_device("lse", lse, q.device);
  args.out = dense<void>("out", out, q.dtype, {batch, args.queries, args.heads, args.cache.dim_v});
  args.lse = dense<float>("lse", lse, Dtype::kFloat32, {batch, args.heads, args.queries});
  return args;
}

// True of plain tensors of one dtype and device that meet: queries, new keys and values if there are any, and
// a cache in full precision, without a rotation, a tree, slopes and sinks.
inline bool decode_fits(py::handle q_, py::handle k_, py::handle v_, py::handle cache, py::handle seqlens_,
                        py::handle rotary, py::handle a) {
  static const CacheNames& of_cache = *new CacheNames;
  static const RotaryNames& of_rotary = *new RotaryNames;
  static const DecodeNames& names = *new DecodeNames;
  auto none = [](const Name& name, py::handle object) { return name.of(object).is_none(); };
  auto finite = [&](const Name& name) {
    const py::object value = name.of(a);
    return PyFloat_CheckExact(value.ptr()) && std::isfinite(PyFloat_AS_DOUBLE(value.ptr()));
  };
  if (!none(of_rotary.cos, rotary) || !none(of_rotary.sin, rotary) || !none(of_rotary.positions, rotary) ||
      !none(names.tree_mask, a) || !none(names.alibi_slopes, a) || !none(names.sinks, a) ||
      !finite(names.softmax_scale) || !finite(names.softcap) || names.softcap.number(a) < 0)
    return false;
  const py::object format = of_cache.format.of(cache);
  if (!PyUnicode_Check(format.ptr()) || PyUnicode_CompareWithASCIIString(format.ptr(), "none") != 0 ||
      !none(of_cache.k_scales, cache) || !none(of_cache.v_scales, cache))
    return false;
  Tensor q, k, v, seqlens;
  if (!plain_layout(q_, q) || !plain_layout(of_cache.k.of(cache), k) ||
      !plain_layout(of_cache.v.of(cache), v) || !plain_layout(seqlens_, seqlens))
    return false;
  if (q.dims != 4 || k.dims != 4 || v.dims != 4 || seqlens.dims != 1) return false;
  const int64_t batch = q.shape[0], kv_heads = k.shape[2], dim = q.shape[3], dim_v = v.shape[3];
  auto alike = [&](const Tensor& t) { return t.dtype == q.dtype && t.device == q.device; };
  auto head = [](int64_t size) { return size > 0 && size <= kMaxHeadDim; };
  if (!is_float(q.dtype) || !alike(k) || !alike(v) || k.shape[3] != dim || !head(dim) || !head(dim_v) ||
      kv_heads <= 0 || q.shape[2] % kv_heads || v.shape[0] != k.shape[0] || v.shape[1] != k.shape[1] ||
      v.shape[2] != kv_heads || !has_dense_rows(k) || !has_dense_rows(v) || seqlens.dtype != Dtype::kInt32 ||
      seqlens.device != q.device || seqlens.shape[0] != batch)
    return false;
  if (const py::object given = of_cache.block_table.of(cache); given.is_none()) {
    if (k.shape[0] != batch) return false;
  } else {
    Tensor table;
    if (!plain_layout(given, table) || table.dims != 2 || table.dtype != Dtype::kInt32 ||
        table.device != q.device || table.shape[0] != batch || !is_power_of_two(k.shape[1]) ||
        table.strides[1] != 1 || table.strides[0] != table.shape[1])
      return false;
  }
  if (k_.is_none() && v_.is_none()) return true;
  Tensor new_k, new_v;
  if (!plain_layout(k_, new_k) || !plain_layout(v_, new_v) || new_k.dims != 4 || new_v.dims != 4)
    return false;
  auto meets = [&](const Tensor& t, int64_t width) {
    return alike(t) && t.shape[0] == batch && t.shape[1] == new_k.shape[1] && t.shape[2] == kv_heads &&
           t.shape[3] == width && has_dense_rows(t);
  };
  return meets(new_k, dim) && meets(new_v, dim_v);
}

}  // namespace bitfuse
