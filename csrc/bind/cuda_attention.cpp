// attention on Hopper, where the kernel was compiled: it is machine code for sm_90a alone.
#include "bind/attention_args.h"
#include "bind/cuda.h"
#include "cuda/attention/attention_sm90.h"

namespace bitfuse {

#ifdef BITFUSE_SM90A
namespace {

constexpr int64_t MostRows = int64_t{1} << 28, MostReach = int64_t{1} << 30;

// The copy engine takes strides that are multiples of 16 bytes, below 2^40. That of a dimension of one is
// never stepped over.
HeadRows walkable(const char* name, const HeadRows& rows, int64_t batch, int64_t length, int64_t heads,
                  int64_t dim) {
  HeadRows made = rows;
  if (batch <= 1) made.batch = dim;
  if (length <= 1) made.row = dim;
  if (heads <= 1) made.head = dim;
  for (int64_t stride : {made.batch, made.row, made.head})
    require(stride > 0 && stride % 8 == 0 && stride < int64_t{1} << 39,
            (std::string(name) + "'s stride").c_str(), stride, "a multiple of 8 below 2**39");
  address<const void>(name, reinterpret_cast<uintptr_t>(rows.data), 16);
  return made;
}

int bound(int64_t given) { return static_cast<int>(given < 0 || given >= MostReach ? MostReach - 1 : given); }

void run(py::handle q_, py::handle k_, py::handle v_, py::handle a, py::handle out_, py::handle lse_,
         py::handle counters_, int64_t multiprocessors, uintptr_t stream) {
  const Tensor q = read("q", q_), k = read("k", k_), v = read("v", v_);
  const AttentionArgs args = read_attention(q, k, v, a);
  if (args.bias.data || args.alibi || args.prefix || args.dropout.p > 0)
    refuse("args", "with a bias, slopes, a prefix or dropout", "none of them");
  AttentionSm90Params p{};
  const int64_t outer = args.packed ? 1 : args.batch;
  p.q = walkable("q", args.q, outer, args.rows, args.heads, args.dim);
  p.k = walkable("k", args.k, outer, args.keys, args.kv_heads, args.dim);
  p.v = walkable("v", args.v, outer, args.keys, args.kv_heads, args.dim_v);
  p.out = attention_out("out", read("out", out_), q, args);
  p.lse = attention_lse("lse", read("lse", lse_), q, args);
  p.out = address<void>("out", reinterpret_cast<uintptr_t>(p.out), 16);
  p.cu_seqlens_q = args.cu_seqlens_q, p.cu_seqlens_k = args.cu_seqlens_k;
  p.sinks = args.sinks;
  const Tensor counters = read("counters", counters_);
  require_device("counters", counters, q.device);
  require_dtype("counters", counters, Dtype::kInt32);
  require(is_dense(counters) && count_of(counters) >= 2, "counters", count_of(counters), "2 or more, dense");
  p.counters = static_cast<unsigned*>(counters.data);
  p.batch = size(args.batch, "batch"), p.heads = size(args.heads, "heads");
  p.kv_heads = size(args.kv_heads, "kv_heads");
  require(args.dim == 64 || args.dim == 128 || args.dim == 256, "dim", args.dim, "64, 128 or 256");
  require(args.dim_v == args.dim, "dim_v", args.dim_v, std::to_string(args.dim));
  p.dim = static_cast<int>(args.dim);
  const int64_t sq = args.max_rows < args.rows ? args.max_rows : args.rows;
  const int64_t sk = args.max_keys < args.keys ? args.max_keys : args.keys;
  p.sq = size(sq, "sq"), p.sk = size(sk, "sk");
  p.total_q = size(args.rows, "total_q"), p.total_k = size(args.keys, "total_k");
  for (int64_t rows : {args.rows, args.keys}) require(rows < MostRows, "rows", rows, "below 2**28");
  // tiles are counted in 32 bits, and those that a block asks for past the last one
  int64_t tiles = (sq + 127) / 128;
  if (__builtin_mul_overflow(tiles, args.batch, &tiles) ||
      __builtin_mul_overflow(tiles, args.heads, &tiles) || tiles >= MostReach) {
    refuse("batch", std::to_string(args.batch), "batch * heads * (sq / 128) below 2**30");
  }
  p.left = bound(args.left), p.right = bound(args.right), p.top_left = args.top_left;
  if (!(args.scale > 0)) refuse("softmax_scale", std::to_string(args.scale), "a number above 0");
  p.scale = args.scale, p.softcap = args.softcap;
  p.multiprocessors = size(multiprocessors, "multiprocessors");
  const Float type = float_type("q", q.dtype);
  const int device = q.device == kHost ? 0 : q.device;
  py::gil_scoped_release released;
  attention_sm90(p, type, device, stream);
}

}  // namespace

void bind_attention(py::module_& module) {
  module.def("attention_sm90", &run, "attention on compute capability 9.0.", py::arg("q"), py::arg("k"),
             py::arg("v"), py::arg("args"), py::arg("out"), py::arg("lse"), py::arg("counters"),
             py::arg("multiprocessors"), py::arg("stream"));
}
#else
void bind_attention(py::module_&) {}
#endif

}  // namespace bitfuse
