#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "bind/cpu_calls.h"
#include "cpu/attention/kv_cache.h"

namespace bitfuse {
namespace {

using CacheIntegers = std::array<int64_t, 26>;
using RotaryIntegers = std::array<int64_t, 9>;
using RowsIntegers = std::array<int64_t, 4>;  // address; strides of batch, token and head

void at_least(const char* name, int64_t value, int64_t least) {
  require(value >= least && value < (int64_t(1) << 40), name, value, std::to_string(least) + " to 2^40");
}

bool power_of_two(int64_t value) { return value > 0 && (value & (value - 1)) == 0; }

// Strides of sizes whose furthest element is below 2^63 bytes.
void check_reach(const char* name, const int64_t* strides, std::initializer_list<int64_t> sizes,
                 int64_t unit) {
  int64_t last = int64_t(1) << 20;  // more than a row
  for (int64_t size : sizes) {
    const int64_t stride = *strides++;
    require(stride >= 0, name, stride, "strides of 0 or more");
    int64_t part;
    if (__builtin_mul_overflow(size, stride, &part) || __builtin_add_overflow(last, part, &last))
      refuse(name, "larger than memory", "strides whose reach is below 2^63");
  }
  check_bytes(name, {last, unit});
}

TokenRows token_rows(const char* name, const RowsIntegers& given, Dtype dtype, int64_t batch, int64_t tokens,
                     int64_t heads) {
  check_reach(name, given.data() + 1, {batch, tokens, heads}, size_of(dtype));
  const bool any = batch > 0 && tokens > 0 && heads > 0;
  return {address<const void>(name, uintptr_t(given[0]), uintptr_t(size_of(dtype)), any), given[1], given[2],
          given[3]};
}

// A cache, whose places are still to be checked.
KvCache make_cache(const CacheIntegers& given) {
  KvCache cache{};
  if (given[0] < 0 || given[0] > 3) refuse("format", std::to_string(given[0]), "0 to 3");
  cache.format = static_cast<CacheFormat>(given[0]);
  cache.dtype = make_dtype("dtype", int(given[1]));
  cache.batch = given[2];
  cache.pages = given[3];
  cache.page_size = given[4];
  cache.kv_heads = given[5];
  cache.dim = given[6];
  cache.dim_v = given[7];
  cache.group_size = given[8];
  cache.channel_group = given[9];
  at_least("batch", cache.batch, 0);
  at_least("pages", cache.pages, 0);
  at_least("page_size", cache.page_size, 0);
  at_least("kv_heads", cache.kv_heads, 1);
  const std::string dims = "1 to " + std::to_string(kMostHeadDim);
  require(cache.dim > 0 && cache.dim <= kMostHeadDim, "dim", cache.dim, dims);
  require(cache.dim_v > 0 && cache.dim_v <= kMostHeadDim, "dim_v", cache.dim_v, dims);
  const bool codes = has_codes(cache.format);
  const int64_t unit = cache.format == CacheFormat::kNone ? size_of(cache.dtype) : 1;
  CacheRows* both[] = {&cache.k, &cache.v};
  const char* names[] = {"k_cache", "v_cache"};
  const bool any = cache.pages > 0 && cache.page_size > 0;
  for (int i = 0; i < 2; ++i) {
    const int64_t* from = given.data() + 10 + 4 * i;
    check_reach(names[i], from + 1, {cache.pages, cache.page_size, cache.kv_heads}, unit);
    *both[i] = {address<char>(names[i], uintptr_t(from[0]), uintptr_t(unit), any), from[1] * unit,
                from[2] * unit, from[3] * unit};
  }
  check_bytes("k_cache", {cache.pages, cache.page_size, cache.kv_heads, kMostHeadDim, 8});
  if (codes) {
    require(power_of_two(cache.group_size) && cache.page_size % cache.group_size == 0, "group_size",
            cache.group_size, "a power of two that divides " + std::to_string(cache.page_size));
    require(cache.group_size <= (1 << 20), "group_size", cache.group_size, "at most 2^20");
    require(cache.channel_group >= 32 && cache.channel_group % 32 == 0, "channel_group", cache.channel_group,
            "a multiple of 32");
    require(cache.dim % 8 == 0, "dim", cache.dim, "a multiple of 8");
    require(cache.dim_v % 8 == 0, "dim_v", cache.dim_v, "a multiple of 8");
    check_bytes("k_tail", {cache.batch, cache.group_size, cache.kv_heads, kMostHeadDim, 16});
    uint16_t** halves[] = {&cache.k_scales, &cache.k_offsets, &cache.v_scales, &cache.v_offsets};
    for (int i = 0; i < 4; ++i)
      *halves[i] = address<uint16_t>("scales", uintptr_t(given[size_t(18 + i)]), 2, any);
    const bool some = cache.batch > 0;
    cache.k_tail = address<void>("k_tail", uintptr_t(given[22]), uintptr_t(size_of(cache.dtype)), some);
    cache.v_tail = address<void>("v_tail", uintptr_t(given[23]), uintptr_t(size_of(cache.dtype)), some);
  } else {
    cache.group_size = cache.channel_group = 1;
    if (cache.format == CacheFormat::kFp8) {
      cache.k_head_scales = address<const float>("k_scales", uintptr_t(given[18]), 4, false);
      cache.v_head_scales = address<const float>("v_scales", uintptr_t(given[20]), 4, false);
    }
  }
  cache.max_pages = given[25];
  if (cache.max_pages >= 0) {
    at_least("max_pages", cache.max_pages, 0);
    cache.table = address<const int32_t>("block_table", uintptr_t(given[24]), 4,
                                         cache.batch > 0 && cache.max_pages > 0);
    check_bytes("block_table", {cache.batch, cache.max_pages, cache.page_size, 4});
  } else {
    require(cache.pages == cache.batch, "pages", cache.pages, std::to_string(cache.batch));
    cache.max_pages = 1;
  }
  return cache;
}

std::string at(const char* name, int64_t b) { return std::string(name) + "[" + std::to_string(b) + "]"; }

// Places of a call's tokens: copies of what was checked, so that whoever writes to the tensors meanwhile
// moves nothing.
struct Places {
  std::vector<int32_t> begins, lengths, table, positions;
};

Places check_places(KvCache& cache, uintptr_t begins, int64_t queries, int64_t tokens) {
  at_least("new tokens", tokens, 0);
  at_least("queries", queries, 0);
  Places places;
  const auto* from = address<const int32_t>("cache_seqlens", begins, 4, cache.batch > 0);
  const int64_t capacity = cache.max_pages * cache.page_size;
  if (cache.table) places.table.resize(size_t(cache.batch * cache.max_pages));
  for (int64_t b = 0; b < cache.batch; ++b) {
    const int64_t begin = from[b], length = begin + tokens;
    if (begin < 0) refuse(at("cache_seqlens", b).c_str(), std::to_string(begin), "0 or more");
    if (tokens > capacity)
      refuse(
          "new tokens", std::to_string(tokens),
          "at most " + std::to_string(capacity) + ", what sequence " + std::to_string(b) + " has room for");
    if (length > capacity || length > INT32_MAX) {
      std::string most = "at most " + std::to_string(capacity - tokens);
      if (tokens)
        most += ", and " + std::to_string(tokens) + " new tokens do not fit: the cache of sequence " +
                std::to_string(b) + " is full";
      refuse(at("cache_seqlens", b).c_str(), std::to_string(begin), most);
    }
    places.begins.push_back(int32_t(begin));
    places.lengths.push_back(int32_t(length));
    if (!cache.table || length == 0) continue;
    const int64_t used = (length + cache.page_size - 1) / cache.page_size;
    for (int64_t i = 0; i < used; ++i) {
      const int32_t page = cache.table[b * cache.max_pages + i];
      if (page < 0 || page >= cache.pages)
        refuse(("block_table[" + std::to_string(b) + ", " + std::to_string(i) + "]").c_str(),
               std::to_string(page),
               "0 to " + std::to_string(cache.pages - 1) +
                   (page == -1
                        ? ": sequence " + std::to_string(b) + " has no page there, KVCache.allocate gives one"
                        : ""));
      places.table[size_t(b * cache.max_pages + i)] = page;
    }
  }
  if (cache.table) cache.table = places.table.data();
  return places;
}

// cos, sin, dtype, half, rows, positions, rows of positions, interleaved, inverse. Positions are copied to
// `places`; without any, `longest` places are needed.
Rotary make_rotary(const RotaryIntegers& given, int64_t batch, int64_t tokens, int64_t dim, int64_t longest,
                   std::vector<int32_t>& places) {
  Rotary rotary;
  if (!given[0]) return rotary;
  rotary.dtype = make_dtype("rotary dtype", int(given[2]));
  rotary.half = given[3];
  require(rotary.half > 0 && 2 * rotary.half <= dim, "rotary half", rotary.half,
          "1 to " + std::to_string(dim / 2));
  const int64_t rows = given[4];
  at_least("rotary rows", rows, 0);
  check_bytes("rotary_cos", {rows, rotary.half, 4});
  rotary.cos = address<const void>("rotary_cos", uintptr_t(given[0]), uintptr_t(size_of(rotary.dtype)));
  rotary.sin = address<const void>("rotary_sin", uintptr_t(given[1]), uintptr_t(size_of(rotary.dtype)));
  rotary.interleaved = given[7] != 0;
  rotary.inverse = given[8] != 0;
  if (given[5]) {
    require(given[6] == 1 || given[6] == batch, "rows of positions", given[6], "1 or the batch");
    check_bytes("positions", {given[6], tokens, 4});
    const auto* from = address<const int32_t>("positions", uintptr_t(given[5]), 4);
    places.assign(from, from + given[6] * tokens);
    for (int32_t p : places)
      if (p < 0 || p >= rows)
        refuse("positions", std::to_string(p),
               "0 to " + std::to_string(rows - 1) + ", the rows of rotary_cos");
    rotary.positions = places.data();
    rotary.positions_batch = given[6] == 1 ? 0 : tokens;
  } else {
    require(longest <= rows, "rows of rotary_cos", rows,
            std::to_string(longest) + " or more: a sequence has so many tokens");
  }
  return rotary;
}

int64_t longest_of(const Places& places) {
  int64_t longest = 0;
  for (int32_t length : places.lengths) longest = length > longest ? length : longest;
  return longest;
}

AppendCall append_call(const KvCache& cache, const Places& places, const RowsIntegers& k,
                       const RowsIntegers& v, int64_t tokens, const Rotary& rotary) {
  AppendCall call{};
  call.cache = cache;
  call.begins = places.begins.data();
  call.tokens = tokens;
  call.k = token_rows("k", k, cache.dtype, cache.batch, tokens, cache.kv_heads);
  call.v = token_rows("v", v, cache.dtype, cache.batch, tokens, cache.kv_heads);
  call.rotary = rotary;
  return call;
}

void append_kv(const CacheIntegers& cache_integers, uintptr_t begins, const RowsIntegers& k,
               const RowsIntegers& v, int64_t tokens, const RotaryIntegers& rotary) {
  KvCache cache = make_cache(cache_integers);
  Places places = check_places(cache, begins, 0, tokens);
  const Rotary turn =
      make_rotary(rotary, cache.batch, tokens, cache.dim, longest_of(places), places.positions);
  const AppendCall call = append_call(cache, places, k, v, tokens, turn);
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(append_kv)(call);
}

void quantize_kv(const CacheIntegers& cache_integers, const RowsIntegers& k, const RowsIntegers& v) {
  QuantizeCall call{};
  call.cache = make_cache(cache_integers);
  require(call.cache.format != CacheFormat::kNone, "format", 0, "1 to 3");
  require(!call.cache.table, "block_table", 1, "none");
  const KvCache& cache = call.cache;
  call.k = token_rows("k", k, cache.dtype, cache.batch, cache.page_size, cache.kv_heads);
  call.v = token_rows("v", v, cache.dtype, cache.batch, cache.page_size, cache.kv_heads);
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(quantize_kv)(call);
}

void rope(int dtype, int64_t batch, int64_t tokens, int64_t heads, int64_t dim, const RowsIntegers& x,
          uintptr_t out, const RotaryIntegers& rotary) {
  RopeCall call{};
  call.dtype = make_dtype("dtype", dtype);
  at_least("batch", batch, 0);
  at_least("tokens", tokens, 0);
  at_least("heads", heads, 0);
  require(dim > 0 && dim <= kMostHeadDim, "dim", dim, "1 to " + std::to_string(kMostHeadDim));
  check_bytes("x", {batch, tokens, heads, dim, 4});
  call.batch = batch;
  call.tokens = tokens;
  call.heads = heads;
  call.dim = dim;
  call.x = token_rows("x", x, call.dtype, batch, tokens, heads);
  call.out = address<void>("out", out, uintptr_t(size_of(call.dtype)), batch && tokens && heads);
  std::vector<int32_t> positions;
  call.rotary = make_rotary(rotary, batch, tokens, dim, tokens, positions);
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(rope)(call);
}

// k and v: of `tokens` new tokens, appended first.
void decode_attention(const CacheIntegers& cache_integers, uintptr_t begins, const RowsIntegers& q,
                      int64_t queries, int64_t heads, const RowsIntegers& k, const RowsIntegers& v,
                      int64_t tokens, const RotaryIntegers& rotary, double scale, double softcap,
                      int64_t left, int64_t right, uintptr_t tree, int64_t tree_rows, uintptr_t alibi,
                      bool alibi_batched, uintptr_t sinks, uintptr_t out, uintptr_t lse) {
  DecodeCall call{};
  KvCache& cache = call.cache = make_cache(cache_integers);
  Places places = check_places(cache, begins, queries, tokens);
  at_least("heads", heads, 0);
  require(heads % cache.kv_heads == 0, "heads", heads, "a multiple of " + std::to_string(cache.kv_heads));
  check_bytes("q", {cache.batch, queries, heads, kMostHeadDim, 64});
  check_bytes("tree_mask", {cache.batch, queries, queries});
  call.lengths = places.lengths.data();
  call.queries = queries;
  call.heads = heads;
  call.q = token_rows("q", q, cache.dtype, cache.batch, queries, heads);
  require(!rotary[5] || !tokens || tokens == queries, "new tokens", tokens, std::to_string(queries));
  call.rotary = make_rotary(rotary, cache.batch, queries, cache.dim, longest_of(places), places.positions);
  if (!(softcap >= 0)) refuse("softcap", std::to_string(softcap), "0 or more");
  call.scale = float(scale);
  call.softcap = float(softcap);
  constexpr int64_t kMostBound = int64_t(1) << 40;
  call.left = left < kMostBound ? left : kMostBound;
  call.right = right < kMostBound ? right : kMostBound;
  call.tree = address<const uint8_t>("tree_mask", tree, 1, false);
  require(!tree || tree_rows == 1 || tree_rows == cache.batch, "tree_mask", tree_rows, "1 or the batch");
  call.tree_batch = tree_rows == 1 ? 0 : queries * queries;
  call.alibi = address<const float>("alibi_slopes", alibi, 4, false);
  call.alibi_batch = alibi_batched ? heads : 0;
  call.sinks = address<const float>("sinks", sinks, 4, false);
  const bool any = cache.batch > 0 && queries > 0 && heads > 0;
  call.out = address<void>("out", out, uintptr_t(size_of(cache.dtype)), any);
  call.lse = address<float>("lse", lse, 4, any);
  const AppendCall append = tokens ? append_call(cache, places, k, v, tokens, call.rotary) : AppendCall{};
  py::gil_scoped_release release;
  if (tokens) BITFUSE_OF_LEVEL(append_kv)(append);
  BITFUSE_OF_LEVEL(decode_attention)(call);
}

void merge_attention(int dtype, int64_t batch, int64_t queries, int64_t heads, int64_t dim, uintptr_t o1,
                     uintptr_t lse1, uintptr_t o2, uintptr_t lse2, uintptr_t out, uintptr_t lse) {
  MergeCall call{};
  call.dtype = make_dtype("dtype", dtype);
  at_least("batch", batch, 0);
  at_least("queries", queries, 0);
  at_least("heads", heads, 0);
  at_least("dim", dim, 0);
  check_bytes("o1", {batch, queries, heads, dim, 4});
  check_bytes("lse1", {batch, queries, heads, 4});
  call.batch = batch;
  call.queries = queries;
  call.heads = heads;
  call.dim = dim;
  const bool any = batch && queries && heads;
  const auto size = uintptr_t(size_of(call.dtype));
  call.o1 = address<const void>("o1", o1, size, any && dim);
  call.o2 = address<const void>("o2", o2, size, any && dim);
  call.lse1 = address<const float>("lse1", lse1, 4, any);
  call.lse2 = address<const float>("lse2", lse2, 4, any);
  call.out = address<void>("out", out, size, any && dim);
  call.lse = address<float>("lse", lse, 4, any);
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(merge_attention)(call);
}

}  // namespace

void bind_decode_attention(py::module_& module) {
  module.def("append_kv", append_kv);
  module.def("quantize_kv", quantize_kv);
  module.def("rope", rope);
  module.def("decode_attention", decode_attention);
  module.def("merge_attention", merge_attention);
}

}  // namespace bitfuse
