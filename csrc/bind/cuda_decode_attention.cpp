#include "bind/cuda.h"
#include "bind/kv_cache.h"
#include "cuda/attention/decode_attention.h"

namespace bitfuse {
namespace {

constexpr int MostTokens = 1 << 30;

int count(int64_t value, const char* name, int64_t least = 0, int64_t most = MostTokens) {
  require(value >= least && value <= most, name, value,
          std::to_string(least) + " to " + std::to_string(most));
  return static_cast<int>(value);
}

// The address of an array whose kernel reads `alignment` bytes at a time.
template <class T>
T* aligned(const char* name, T* data, uintptr_t alignment) {
  return address<T>(name, reinterpret_cast<uintptr_t>(data), alignment, false);
}

// Strides are multiples of `multiple`, unless nothing is stepped over.
void check_strides(const char* name, std::initializer_list<int64_t> strides,
                   std::initializer_list<int64_t> sizes, int64_t multiple) {
  const int64_t* size = sizes.begin();
  for (int64_t stride : strides)
    require(*size++ <= 1 || stride % multiple == 0, name, stride,
            "strides that are multiples of " + std::to_string(multiple));
}

HeadRows aligned_rows(const char* name, const HeadRows& rows, int64_t batch, int64_t tokens, int64_t heads,
                      int64_t multiple) {
  check_strides(name, {rows.batch, rows.row, rows.head}, {batch, tokens, heads}, multiple);
  aligned(name, rows.data, 2 * uintptr_t(multiple));
  return rows;
}

DeviceRows device_rows(const char* name, const CacheRows& rows, const KvCache& cache) {
  check_strides(name, {rows.page, rows.slot, rows.head}, {cache.pages, cache.page_size, cache.kv_heads}, 16);
  // the kernel has strides in 16 bytes in 32 bits
  for (int64_t stride : {rows.page, rows.slot})
    require(stride / 16 <= UINT32_MAX, name, stride, "strides below 64 GiB");
  return {reinterpret_cast<unsigned char*>(aligned(name, rows.data, 16)), rows.page, rows.slot, rows.head};
}

DeviceCache device_cache(const KvCache& cache, Float type) {
  DeviceCache made{};
  made.format = cache.format;
  made.type = type;
  made.batch = count(cache.batch, "batch");
  made.pages = count(cache.pages, "pages");
  made.page_size = count(cache.page_size, "page_size");
  made.kv_heads = count(cache.kv_heads, "kv_heads", 1, 1 << 16);
  const int bits = cache.format == CacheFormat::kNone ? 16 : bits_of(cache.format);
  made.dim = count(cache.dim, "dim", 1, kMaxHeadSize);
  made.dim_v = count(cache.dim_v, "dim_v", 1, kMaxHeadSize);
  for (int dim : {made.dim, made.dim_v})
    require(dim * bits % 128 == 0, "dim", dim, "a multiple of " + std::to_string(128 / bits));
  made.k = device_rows("k_cache", cache.k, cache);
  made.v = device_rows("v_cache", cache.v, cache);
  made.table = cache.table;
  made.max_pages = count(cache.max_pages, "max_pages");
  made.log_page_size = 31, made.slot_mask = 0x7fffffff;
  if (cache.table != nullptr && made.max_pages > 1) {
    require(is_power_of_two(made.page_size), "page_size", made.page_size, "a power of two");
    made.log_page_size = __builtin_ctz(made.page_size), made.slot_mask = made.page_size - 1;
  }
  made.capacity = count(cache.capacity(), "capacity");
  made.k_head_scales = cache.k_head_scales, made.v_head_scales = cache.v_head_scales;
  made.group_size = made.channel_group = 1;
  if (has_codes(cache.format)) {
    made.group_size = count(cache.group_size, "group_size", 32);
    made.channel_group = count(cache.channel_group, "channel_group", 32);
    made.value_groups = static_cast<int>(cache.value_groups());
    require(made.value_groups < 3 || made.value_groups * made.kv_heads % 2 == 0, "channel_group",
            made.channel_group, "an even number of V's scales for a token, or one or two a head");
    require(cache.pages * cache.page_size <= INT32_MAX && cache.batch * cache.group_size <= INT32_MAX / 2,
            "pages", cache.pages, "fewer than 2^31 tokens");
    made.k_scales = aligned("k_scales", cache.k_scales, 16);
    made.k_offsets = aligned("k_offsets", cache.k_offsets, 16);
    made.v_scales = aligned("v_scales", cache.v_scales, 4);
    made.v_offsets = aligned("v_offsets", cache.v_offsets, 4);
    made.k_tail = aligned("k_tail", cache.k_tail, 16);
    made.v_tail = aligned("v_tail", cache.v_tail, 16);
  }
  return made;
}

DeviceRotary device_rotary(const Rotary& rotary) {
  DeviceRotary made{};
  if (rotary.cos == nullptr) return made;
  made.cos = rotary.cos, made.sin = rotary.sin;
  made.type = rotary.dtype;
  made.half = count(rotary.half, "rotary half", 1);
  made.rows = count(rotary.rows, "rotary rows", 1);
  made.positions = rotary.positions;
  made.positions_batch = rotary.positions_batch;
  made.interleaved = rotary.interleaved;
  return made;
}

DecodeShape shape_of_call(const DeviceCache& cache, int queries, int heads) {
  return {cache.format, cache.type,     cache.batch, cache.kv_heads, cache.dim,
          cache.dim_v,  cache.capacity, queries,     heads};
}

DecodePlan plan(py::handle format, py::handle dtype, int64_t batch, int64_t kv_heads, int64_t dim,
                int64_t dim_v, int64_t capacity, int64_t queries, int64_t heads, int multiprocessors,
                int shared_per_block, int shared_per_multiprocessor, int capability) {
  const DecodeShape shape{cache_format(format),
                          float_type("dtype", dtype_named(dtype)),
                          count(batch, "batch", 1),
                          count(kv_heads, "kv_heads", 1, 1 << 16),
                          count(dim, "dim", 1, kMaxHeadSize),
                          count(dim_v, "dim_v", 1, kMaxHeadSize),
                          count(capacity, "capacity"),
                          count(queries, "queries", 1),
                          count(heads, "heads", 1)};
  require(heads % kv_heads == 0, "heads", heads, "a multiple of " + std::to_string(kv_heads));
  require(multiprocessors > 0 && multiprocessors <= 1 << 16, "multiprocessors", multiprocessors,
          "a positive number");
  // the units of work, 64 tokens or more of a row tile each, and the tiles of queries, are counted in 31 bits
  int64_t units = queries;
  for (int64_t factor : {heads, batch, capacity / 64 + 2}) {
    if (__builtin_mul_overflow(units, factor, &units)) units = INT64_MAX;
    require(units <= INT32_MAX, "batch", batch, "fewer sequences, heads, queries or tokens: too much work");
  }
  return plan_decode_attention(shape,
                               {multiprocessors, shared_per_block, shared_per_multiprocessor, capability});
}

// Room of a plan's: a dense array of `least` elements or more.
template <class T>
T* room(const char* name, py::handle object, const Tensor& like, Dtype dtype, int64_t least,
        uintptr_t alignment) {
  const Tensor t = read(name, object);
  require_device(name, t, like.device);
  require_dtype(name, t, dtype);
  require(is_dense(t) && count_of(t) >= least, name, count_of(t), std::to_string(least) + " or more, dense");
  return aligned(name, static_cast<T*>(t.data), alignment);
}

void run(py::handle q_, py::handle k, py::handle v, py::handle cache, py::handle seqlens, py::handle rotary,
         py::handle a, py::handle out, py::handle lse, py::handle partial, py::handle counters,
         const DecodePlan* plan, uintptr_t stream) {
  const Tensor q = read("q", q_);
  const DecodeArgs args = read_decode(q, k, v, cache, seqlens, rotary, a, out, lse);
  const Float type = float_type("q", q.dtype);
  DecodeParams call{};
  call.cache = device_cache(args.cache, type);
  call.seqlens = args.seqlens;
  call.new_tokens = count(args.tokens, "new tokens");
  call.queries = count(args.queries, "queries");
  call.heads = count(args.heads, "heads");
  call.rotary = device_rotary(args.rotary);
  AppendParams append{};
  if (args.tokens) {
    require(args.cache.batch * args.cache.kv_heads <= INT32_MAX, "batch", args.cache.batch,
            "fewer sequences");
    append.cache = call.cache;
    append.begins = call.seqlens;
    append.tokens = call.new_tokens;
    append.k = aligned_rows("k", args.k, args.cache.batch, args.tokens, args.cache.kv_heads, 1);
    append.v = aligned_rows("v", args.v, args.cache.batch, args.tokens, args.cache.kv_heads, 1);
    append.rotary = call.rotary;
  }
  if (plan != nullptr) {
    require(plan->shape == shape_of_call(call.cache, call.queries, call.heads) && plan->dim > 0, "plan",
            plan->dim, "one for this call's sizes");
    call.q = aligned_rows("q", args.q, args.cache.batch, args.queries, args.heads, 8);
    call.scale = args.scale, call.softcap = args.softcap;
    call.left = static_cast<int>(args.left < MostTokens ? args.left : MostTokens);
    call.right = static_cast<int>(args.right < MostTokens ? args.right : MostTokens);
    call.tree = args.tree;
    call.tree_batch = args.tree_batch;
    call.alibi = args.alibi;
    call.alibi_batch = static_cast<int>(args.alibi_batch);
    call.sinks = args.sinks;
    call.out = aligned("out", args.out, 8);
    call.lse = args.lse;
    call.partial = room<float>("partial", partial, q, Dtype::kFloat32, plan->partial_floats, 16);
    call.counters = room<unsigned>("counters", counters, q, Dtype::kInt32, plan->counters, 4);
  }
  const int device = q.device == kHost ? 0 : q.device;
  py::gil_scoped_release released;
  if (args.tokens) append_kv(append, device, stream);
  if (plan != nullptr) decode_attention(call, *plan, device, stream);
}

}  // namespace

void bind_decode_attention(py::module_& module) {
  py::class_<DecodePlan>(module, "DecodePlan", py::module_local())
      .def_readonly("dim", &DecodePlan::dim)
      .def_readonly("blocks", &DecodePlan::blocks)
      .def_readonly("stages", &DecodePlan::stages)
      .def_readonly("row_tiles", &DecodePlan::row_tiles)
      .def_readonly("least_units", &DecodePlan::least_units)
      .def_readonly("shared_bytes", &DecodePlan::shared_bytes)
      .def_readonly("partial_floats", &DecodePlan::partial_floats)
      .def_readonly("counters", &DecodePlan::counters);
  module.def("plan_decode_attention", &plan, "How the work of a shape is cut on a device.", py::kw_only(),
             py::arg("format"), py::arg("dtype"), py::arg("batch"), py::arg("kv_heads"), py::arg("dim"),
             py::arg("dim_v"), py::arg("capacity"), py::arg("queries"), py::arg("heads"),
             py::arg("multiprocessors"), py::arg("shared_per_block"), py::arg("shared_per_multiprocessor"),
             py::arg("capability"));
  module.def(
      "decode_attention", &run,
      "Appends k and v, if they are given, to CacheTensors; then attends as DecodeArgs say, if there is "
      "a plan.",
      py::arg("q"), py::arg("k"), py::arg("v"), py::arg("cache"), py::arg("cache_seqlens"), py::arg("rotary"),
      py::arg("args"), py::arg("out"), py::arg("lse"), py::arg("partial"), py::arg("counters"),
      py::arg("plan"), py::arg("stream"));
}

}  // namespace bitfuse
