// The ops of a KV cache: places of tokens are looked at before anything is written.
#include <vector>

#include "bind/cpu.h"
#include "bind/kv_cache.h"
#include "cpu/attention/kv_cache.h"

namespace bitfuse {
namespace {

std::string at(const char* name, int64_t b) { return std::string(name) + "[" + std::to_string(b) + "]"; }

// Places of a call's tokens: copies of what was checked, so that whoever writes to the tensors meanwhile
// moves nothing.
struct Places {
  std::vector<int32_t> seqlens, table, positions;
  int64_t longest = 0;  // tokens of a sequence, with the new ones
};

// Looks at lengths and pages, and has `args` point to the copies.
void check_places(AppendArgs& args, Places& places) {
  KvCache& cache = args.cache;
  const int64_t capacity = cache.capacity(), tokens = args.tokens;
  if (cache.table) places.table.resize(size_t(cache.batch * cache.max_pages));
  places.seqlens.reserve(size_t(cache.batch));
  for (int64_t b = 0; b < cache.batch; ++b) {
    const int64_t begin = args.seqlens[b], length = begin + tokens;
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
    places.seqlens.push_back(int32_t(begin));
    places.longest = length > places.longest ? length : places.longest;
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
  args.seqlens = places.seqlens.data();
  if (!places.table.empty()) cache.table = places.table.data();
}

// Looks at positions, of which the rotary then has copies; without any, `longest` places are needed.
void check_positions(Rotary& rotary, int64_t batch, int64_t tokens, int64_t longest,
                     std::vector<int32_t>& copies) {
  if (!rotary.cos) return;
  if (rotary.positions) {
    copies.assign(rotary.positions, rotary.positions + (rotary.positions_batch ? batch : 1) * tokens);
    for (int32_t p : copies)
      if (p < 0 || p >= rotary.rows)
        refuse("positions", std::to_string(p),
               "0 to " + std::to_string(rotary.rows - 1) + ", the rows of rotary_cos");
    rotary.positions = copies.data();
  } else {
    require(longest <= rotary.rows, "rows of rotary_cos", rotary.rows,
            std::to_string(longest) + " or more: a sequence has so many tokens");
  }
}

void append_kv(py::handle k_, py::handle v_, py::handle cache, py::handle seqlens, py::handle rotary) {
  const Tensor k = read("k", k_), v = read("v", v_);
  require_device("k", k, kHost);
  if (k.dims != 4) refuse("k", "of shape " + shape_of(k), "[batch, tokens, kv_heads, head_dim]");
  AppendArgs args;
  args.cache = read_cache(cache, k, k.shape[0]);
  args.seqlens = read_seqlens(seqlens, k, k.shape[0]);
  read_new(args, k, v, k);
  args.rotary = read_rotary(rotary, k, k.shape[0], args.tokens, args.cache.dim);
  Places places;
  check_places(args, places);
  check_positions(args.rotary, args.cache.batch, args.tokens, places.longest, places.positions);
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(append_kv)(args);
}

void quantize_kv(py::handle k_, py::handle v_, py::handle cache) {
  const Tensor k = read("k", k_), v = read("v", v_);
  require_device("k", k, kHost);
  if (k.dims != 4) refuse("k", "of shape " + shape_of(k), "[batch, tokens, kv_heads, head_dim]");
  QuantizeKvArgs args;
  args.cache = read_cache(cache, k, k.shape[0], false);
  const KvCache& of = args.cache;
  if (of.format == CacheFormat::kNone) refuse("format", "'none'", "'fp8', 'int8' or 'int4'");
  if (of.table) refuse("block_table", "given", "none");
  args.k = head_rows("k", k, k, of.batch, of.page_size, of.kv_heads, of.dim);
  args.v = head_rows("v", v, k, of.batch, of.page_size, of.kv_heads, of.dim_v);
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(quantize_kv)(args);
}

void rope(py::handle x_, py::handle rotary, bool inverse, py::handle out_) {
  const Tensor x = read("x", x_), out = read("out", out_);
  require_device("x", x, kHost);
  require_float("x", x);
  if (x.dims != 4) refuse("x", "of shape " + shape_of(x), "[batch, seq, heads, head_dim]");
  RopeArgs args;
  args.dtype = x.dtype;
  args.batch = x.shape[0], args.tokens = x.shape[1], args.heads = x.shape[2], args.dim = x.shape[3];
  require_tokens("batch", args.batch);
  require_tokens("tokens", args.tokens);
  require_tokens("heads", args.heads);
  require_head_dim("dim", args.dim);
  args.x = head_rows("x", x, x, args.batch, args.tokens, args.heads, args.dim);
  require_device("out", out, kHost);
  args.out = dense<void>("out", out, x.dtype, {args.batch, args.tokens, args.heads, args.dim});
  args.rotary = read_rotary(rotary, x, args.batch, args.tokens, args.dim, inverse);
  std::vector<int32_t> positions;
  check_positions(args.rotary, args.batch, args.tokens, args.tokens, positions);
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(rope)(args);
}

void decode_attention(py::handle q_, py::handle k, py::handle v, py::handle cache, py::handle seqlens,
                      py::handle rotary, py::handle a, py::handle out, py::handle lse) {
  const Tensor q = read("q", q_);
  require_device("q", q, kHost);
  DecodeArgs args = read_decode(q, k, v, cache, seqlens, rotary, a, out, lse);
  Places places;
  check_places(args, places);
  check_positions(args.rotary, args.cache.batch, args.queries, places.longest, places.positions);
  py::gil_scoped_release release;
  if (args.tokens) BITFUSE_OF_LEVEL(append_kv)(args);
  BITFUSE_OF_LEVEL(decode_attention)(args);
}

void merge_attention(py::handle o1, py::handle lse1, py::handle o2, py::handle lse2, py::handle out,
                     py::handle lse) {
  const Tensor first = read("o1", o1);
  require_device("o1", first, kHost);
  require_float("o1", first);
  if (first.dims != 4) refuse("o1", "of shape " + shape_of(first), "[batch, seq, heads, head_dim]");
  MergeArgs args;
  args.dtype = first.dtype;
  args.batch = first.shape[0], args.queries = first.shape[1], args.heads = first.shape[2];
  args.dim = first.shape[3];
  require_tokens("batch", args.batch);
  require_tokens("queries", args.queries);
  require_tokens("heads", args.heads);
  require_tokens("dim", args.dim);
  auto output = [&](const char* name, py::handle object) {
    const Tensor t = read(name, object);
    require_device(name, t, kHost);
    return dense<void>(name, t, args.dtype, {args.batch, args.queries, args.heads, args.dim});
  };
  auto sums = [&](const char* name, py::handle object) {
    const Tensor t = read(name, object);
    require_device(name, t, kHost);
    return dense<float>(name, t, Dtype::kFloat32, {args.batch, args.heads, args.queries});
  };
  args.o1 = output("o1", o1), args.o2 = output("o2", o2), args.out = output("out", out);
  args.lse1 = sums("lse1", lse1), args.lse2 = sums("lse2", lse2), args.lse = sums("lse", lse);
  py::gil_scoped_release release;
  BITFUSE_OF_LEVEL(merge_attention)(args);
}

}  // namespace

void bind_decode_attention(py::module_& module) {
  module.def("append_kv", append_kv, "New keys and values into CacheTensors, in place.", py::arg("k"),
             py::arg("v"), py::arg("cache"), py::arg("cache_seqlens"), py::arg("rotary"));
  module.def("quantize_kv", quantize_kv, "All of k and v into CacheTensors without tails.", py::arg("k"),
             py::arg("v"), py::arg("cache"));
  module.def("rope", rope, "x turned by Rotary, to out.", py::arg("x"), py::arg("rotary"), py::arg("inverse"),
             py::arg("out"));
  module.def("decode_attention", decode_attention,
             "Appends k and v, if they are given, to CacheTensors; then attends as DecodeArgs say.",
             py::arg("q"), py::arg("k"), py::arg("v"), py::arg("cache"), py::arg("cache_seqlens"),
             py::arg("rotary"), py::arg("args"), py::arg("out"), py::arg("lse"));
  module.def("decode_attention_fits", decode_fits,
             "True of plain tensors of one dtype and device that meet a cache in full precision, and need "
             "nothing else: what the op's check need not look at.",
             py::arg("q"), py::arg("k"), py::arg("v"), py::arg("cache"), py::arg("cache_seqlens"),
             py::arg("rotary"), py::arg("args"));
  module.def("merge_attention", merge_attention, py::arg("o1"), py::arg("lse1"), py::arg("o2"),
             py::arg("lse2"), py::arg("out"), py::arg("lse"));
}

}  // namespace bitfuse
