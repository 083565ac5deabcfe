#include <pybind11/stl.h>

#include <array>

#include "bind/cuda.h"
#include "cuda/attention/decode_attention.h"

namespace bitfuse {
namespace {

using CacheIntegers = std::array<int64_t, 26>;
using RotaryIntegers = std::array<int64_t, 8>;
using RowsIntegers = std::array<int64_t, 4>;  // address; strides of batch, token and head

constexpr int MostTokens = 1 << 30;

int count(int64_t value, const char* name, int64_t least = 0, int64_t most = MostTokens) {
  require(value >= least && value <= most, name, value,
          std::to_string(least) + " to " + std::to_string(most));
  return static_cast<int>(value);
}

bool power_of_two(int64_t value) { return value > 0 && (value & (value - 1)) == 0; }

// Strides, in units of `unit` bytes and multiples of `multiple` of them, of sizes whose furthest element is
// below 2^63 bytes.
void check_reach(const char* name, const int64_t* strides, std::initializer_list<int64_t> sizes, int64_t unit,
                 int64_t multiple) {
  int64_t last = int64_t(1) << 20;  // more than a row
  for (int64_t size : sizes) {
    const int64_t stride = *strides++;
    require(stride >= 0 && (size <= 1 || stride % multiple == 0), name, stride,
            "strides of 0 or more, multiples of " + std::to_string(multiple));
    int64_t part;
    if (__builtin_mul_overflow(size, stride, &part) || __builtin_add_overflow(last, part, &last))
      refuse(name, "larger than memory", "strides whose reach is below 2^63");
  }
  check_bytes(name, {last, unit});
}

TokenRows token_rows(const char* name, const RowsIntegers& given, int64_t batch, int64_t tokens,
                     int64_t heads, int64_t multiple) {
  check_reach(name, given.data() + 1, {batch, tokens, heads}, 2, multiple);
  const bool any = batch > 0 && tokens > 0 && heads > 0;
  return {address<const void>(name, given[0], 2 * multiple, any), given[1], given[2], given[3]};
}

KvCache make_cache(const CacheIntegers& given) {
  KvCache cache{};
  cache.format = choice<CacheFormat>(static_cast<int>(given[0]), 4, "format");
  cache.type = choice<Float>(static_cast<int>(given[1]), 2, "type");
  cache.batch = count(given[2], "batch");
  cache.pages = count(given[3], "pages");
  cache.page_size = count(given[4], "page_size");
  cache.kv_heads = count(given[5], "kv_heads", 1, 1 << 16);
  const bool codes = has_codes(cache.format);
  const int bits = cache.format == CacheFormat::None ? 16 : cache.format == CacheFormat::Int4 ? 4 : 8;
  cache.dim = count(given[6], "dim", 1, MostHeadDim);
  cache.dim_v = count(given[7], "dim_v", 1, MostHeadDim);
  for (int dim : {cache.dim, cache.dim_v}) {
    require(dim * bits % 128 == 0, "dim", dim, "a multiple of " + std::to_string(128 / bits));
  }
  const bool any = cache.pages > 0 && cache.page_size > 0;
  const int unit = cache.format == CacheFormat::None ? 2 : 1;
  CacheRows* both[] = {&cache.k, &cache.v};
  const char* names[] = {"k_cache", "v_cache"};
  for (int i = 0; i < 2; ++i) {
    const int64_t* from = given.data() + 10 + 4 * i;
    check_reach(names[i], from + 1, {cache.pages, cache.page_size, cache.kv_heads}, unit, 16 / unit);
    // the kernel has strides in 16 bytes in 32 bits
    for (int j = 1; j < 3; ++j) {
      require(from[j] * unit / 16 <= UINT32_MAX, names[i], from[j], "strides below 64 GiB");
    }
    *both[i] = {address<unsigned char>(names[i], from[0], 16, any), from[1] * unit, from[2] * unit,
                from[3] * unit};
  }
  cache.table = address<const int>("block_table", given[24], 4, false);
  cache.max_pages = count(given[25], "max_pages");
  cache.log_page_size = 31, cache.slot_mask = 0x7fffffff;
  if (cache.table == nullptr) {
    require(cache.pages == cache.batch, "pages", cache.pages, std::to_string(cache.batch));
    require(cache.max_pages == 1, "max_pages", cache.max_pages, "1 without a block_table");
  } else if (cache.max_pages > 1) {
    require(power_of_two(cache.page_size), "page_size", cache.page_size, "a power of two");
    cache.log_page_size = __builtin_ctz(cache.page_size), cache.slot_mask = cache.page_size - 1;
  }
  cache.capacity = count(static_cast<int64_t>(cache.max_pages) * cache.page_size, "capacity");
  check_bytes("block_table", {cache.batch, cache.max_pages, 4});
  cache.group_size = cache.channel_group = 1;
  if (cache.format == CacheFormat::Fp8) {
    cache.k_head_scales = address<const float>("k_scales", given[18], 4, false);
    cache.v_head_scales = address<const float>("v_scales", given[20], 4, false);
  } else if (codes) {
    cache.group_size = count(given[8], "group_size", 32);
    cache.channel_group = count(given[9], "channel_group", 32);
    require(power_of_two(cache.group_size) && cache.page_size % cache.group_size == 0, "group_size",
            cache.group_size, "a power of two that divides " + std::to_string(cache.page_size));
    require(cache.channel_group % 32 == 0, "channel_group", cache.channel_group, "a multiple of 32");
    cache.value_groups = (cache.dim_v + cache.channel_group - 1) / cache.channel_group;
    require(cache.value_groups < 3 || cache.value_groups * cache.kv_heads % 2 == 0, "channel_group",
            cache.channel_group, "an even number of V's scales for a token, or one or two a head");
    require(static_cast<int64_t>(cache.pages) * cache.page_size <= INT32_MAX &&
                static_cast<int64_t>(cache.batch) * cache.group_size <= INT32_MAX / 2,
            "pages", cache.pages, "fewer than 2^31 tokens");
    check_bytes("k_scales", {cache.pages, cache.page_size, cache.kv_heads, MostHeadDim, 4});
    check_bytes("k_tail", {cache.batch, cache.group_size, cache.kv_heads, MostHeadDim, 8});
    unsigned short** halves[] = {&cache.k_scales, &cache.k_offsets, &cache.v_scales, &cache.v_offsets};
    const char* which[] = {"k_scales", "k_offsets", "v_scales", "v_offsets"};
    for (int i = 0; i < 4; ++i) {
      *halves[i] = address<unsigned short>(which[i], given[18 + i], i < 2 ? 16 : 4, any);
    }
    cache.k_tail = address<void>("k_tail", given[22], 16, cache.batch > 0);
    cache.v_tail = address<void>("v_tail", given[23], 16, cache.batch > 0);
  }
  return cache;
}

// cos, sin, type, half, rows, positions, rows of positions, interleaved.
Rotary make_rotary(const RotaryIntegers& given, int batch, int tokens, int dim) {
  Rotary rotary{};
  if (!given[0]) return rotary;
  rotary.type = choice<RotaryType>(static_cast<int>(given[2]), 3, "rotary type");
  const uintptr_t alignment = rotary.type == RotaryType::Float32 ? 4 : 2;
  rotary.cos = address<const void>("rotary_cos", given[0], alignment);
  rotary.sin = address<const void>("rotary_sin", given[1], alignment);
  rotary.half = count(given[3], "rotary half", 1, dim / 2);
  rotary.rows = count(given[4], "rotary rows", 1);
  rotary.positions = address<const int>("positions", given[5], 4, false);
  if (rotary.positions != nullptr) {
    require(given[6] == 1 || given[6] == batch, "rows of positions", given[6], "1 or the batch");
    check_bytes("positions", {given[6], tokens, 4});
    rotary.positions_batch = given[6] == 1 ? 0 : tokens;
  }
  rotary.interleaved = given[7] != 0;
  return rotary;
}

DecodePlan plan(int format, int type, int64_t batch, int64_t kv_heads, int64_t dim, int64_t dim_v,
                int64_t capacity, int64_t queries, int64_t heads, int multiprocessors, int shared_per_block,
                int shared_per_multiprocessor, int capability) {
  DecodeShape shape{choice<CacheFormat>(format, 4, "format"),
                    choice<Float>(type, 2, "type"),
                    count(batch, "batch", 1),
                    count(kv_heads, "kv_heads", 1, 1 << 16),
                    count(dim, "dim", 1, MostHeadDim),
                    count(dim_v, "dim_v", 1, MostHeadDim),
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

// k and v: of `tokens` new tokens, appended first.
void run(const CacheIntegers& cache_integers, uintptr_t seqlens, const RowsIntegers& q, int64_t queries,
         int64_t heads, const RowsIntegers& k, const RowsIntegers& v, int64_t tokens,
         const RotaryIntegers& rotary, double scale, double softcap, int64_t left, int64_t right,
         uintptr_t tree, int64_t tree_rows, uintptr_t alibi, bool alibi_batched, uintptr_t sinks,
         uintptr_t out, uintptr_t lse, uintptr_t partial, uintptr_t counters, const DecodePlan* plan,
         int device, uintptr_t stream) {
  DecodeArgs call{};
  KvCache& cache = call.cache = make_cache(cache_integers);
  require(device >= 0, "device", device, "a device's number");
  call.seqlens = address<const int>("cache_seqlens", seqlens, 4, cache.batch > 0);
  call.new_tokens = count(tokens, "new tokens");
  call.queries = count(queries, "queries");
  call.heads = count(heads, "heads");
  require(heads % cache.kv_heads == 0, "heads", heads, "a multiple of " + std::to_string(cache.kv_heads));
  require(!rotary[5] || !tokens || tokens == queries, "new tokens", tokens, std::to_string(queries));
  call.rotary = make_rotary(rotary, cache.batch, call.queries, cache.dim);
  AppendArgs append{};
  if (tokens) {
    require(int64_t(cache.batch) * cache.kv_heads <= INT32_MAX, "batch", cache.batch, "fewer sequences");
    append = {cache,
              call.seqlens,
              call.new_tokens,
              token_rows("k", k, cache.batch, tokens, cache.kv_heads, 1),
              token_rows("v", v, cache.batch, tokens, cache.kv_heads, 1),
              call.rotary};
  }
  if (plan != nullptr) {
    const DecodeShape shape{cache.format, cache.type,     cache.batch,  cache.kv_heads, cache.dim,
                            cache.dim_v,  cache.capacity, call.queries, call.heads};
    require(plan->shape == shape && plan->dim > 0, "plan", plan->dim, "one for this call's sizes");
    call.q = token_rows("q", q, cache.batch, queries, heads, 8);
    if (!(softcap >= 0)) refuse("softcap", std::to_string(softcap), "0 or more");
    call.scale = static_cast<float>(scale), call.softcap = static_cast<float>(softcap);
    call.left = static_cast<int>(left < MostTokens ? left : MostTokens);
    call.right = static_cast<int>(right < MostTokens ? right : MostTokens);
    if (left < 0) call.left = -1;
    if (right < 0) call.right = -1;
    call.tree = address<const unsigned char>("tree_mask", tree, 1, false);
    require(!tree || tree_rows == 1 || tree_rows == cache.batch, "tree_mask", tree_rows, "1 or the batch");
    check_bytes("tree_mask", {cache.batch, queries, queries});
    call.tree_batch = tree_rows == 1 ? 0 : queries * queries;
    call.alibi = address<const float>("alibi_slopes", alibi, 4, false);
    call.alibi_batch = alibi_batched ? call.heads : 0;
    call.sinks = address<const float>("sinks", sinks, 4, false);
    call.out = address<void>("out", out, 8);
    call.lse = address<float>("lse", lse, 4);
    call.partial = address<float>("partial", partial, 16);
    call.counters = address<unsigned>("counters", counters, 4);
  }
  py::gil_scoped_release released;
  if (tokens) append_kv(append, device, stream);
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
  module.def("plan_decode_attention", &plan);
  module.def("decode_attention", &run, "Appends new tokens, if any; then attends, if there is a plan.");
}

}  // namespace bitfuse
