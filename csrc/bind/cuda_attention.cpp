// attention on Hopper, where the kernel was compiled: it is machine code for sm_90a alone.
#include "bind/cuda.h"
#include "cuda/attention/attention_sm90.h"

namespace bitfuse {

#ifdef BITFUSE_SM90A
namespace {

constexpr int64_t MostRows = int64_t{1} << 28, MostReach = int64_t{1} << 30;

// [batch, rows, heads, dim]; the copy engine takes strides that are multiples of 16 bytes, below 2^40.
AttentionTensor tensor(const char* name, uintptr_t data, int64_t batch, int64_t row, int64_t head) {
  for (int64_t stride : {batch, row, head}) {
    require(stride > 0 && stride % 8 == 0 && stride < int64_t{1} << 39,
            (std::string(name) + "'s stride").c_str(), stride, "a multiple of 8 below 2**39");
  }
  return {address<const void>(name, data, 16), batch, row, head};
}

void run(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t lse, uintptr_t cu_seqlens_q,
         uintptr_t cu_seqlens_k, uintptr_t sinks, uintptr_t counters, int64_t q_batch, int64_t q_row,
         int64_t q_head, int64_t k_batch, int64_t k_row, int64_t k_head, int64_t v_batch, int64_t v_row,
         int64_t v_head, int64_t batch, int64_t heads, int64_t kv_heads, int64_t dim, int64_t sq, int64_t sk,
         int64_t total_q, int64_t total_k, int64_t left, int64_t right, bool top_left, double scale,
         double softcap, int type, int64_t multiprocessors, int device, uintptr_t stream) {
  AttentionSm90Args a{};
  a.q = tensor("q", q, q_batch, q_row, q_head);
  a.k = tensor("k", k, k_batch, k_row, k_head);
  a.v = tensor("v", v, v_batch, v_row, v_head);
  a.out = address<void>("out", out, 16);
  a.lse = address<float>("lse", lse, 4);
  a.cu_seqlens_q = address<const int>("cu_seqlens_q", cu_seqlens_q, 4, false);
  a.cu_seqlens_k = address<const int>("cu_seqlens_k", cu_seqlens_k, 4, false);
  if ((cu_seqlens_q == 0) != (cu_seqlens_k == 0)) refuse("cu_seqlens_k", "given or not", "as cu_seqlens_q");
  a.sinks = address<const float>("sinks", sinks, 4, false);
  a.counters = address<unsigned>("counters", counters, 4);
  a.batch = size(batch, "batch"), a.heads = size(heads, "heads"), a.kv_heads = size(kv_heads, "kv_heads");
  require(heads % kv_heads == 0, "kv_heads", kv_heads, "a divisor of heads");
  require(dim == 64 || dim == 128 || dim == 256, "dim", dim, "64, 128 or 256");
  a.dim = static_cast<int>(dim);
  a.sq = size(sq, "sq"), a.sk = size(sk, "sk");
  a.total_q = size(total_q, "total_q"), a.total_k = size(total_k, "total_k");
  for (int64_t rows : {sq, sk, total_q, total_k}) require(rows < MostRows, "rows", rows, "below 2**28");
  // tiles are counted in 32 bits, and those that a block asks for past the last one
  int64_t tiles = (sq + 127) / 128;
  if (__builtin_mul_overflow(tiles, batch, &tiles) || __builtin_mul_overflow(tiles, heads, &tiles) ||
      tiles >= MostReach) {
    refuse("batch", std::to_string(batch), "batch * heads * (sq / 128) below 2**30");
  }
  require(left >= 0 && left < MostReach, "left", left, "0 to 2**30 - 1");
  require(right >= 0 && right < MostReach, "right", right, "0 to 2**30 - 1");
  a.left = static_cast<int>(left), a.right = static_cast<int>(right), a.top_left = top_left;
  if (!(scale > 0)) refuse("scale", std::to_string(scale), "a number above 0");
  if (!(softcap >= 0)) refuse("softcap", std::to_string(softcap), "0 or more");
  a.scale = static_cast<float>(scale), a.softcap = static_cast<float>(softcap);
  a.multiprocessors = size(multiprocessors, "multiprocessors");
  require(device >= 0, "device", device, "a device's number");
  const auto element = choice<Float>(type, 2, "type");
  py::gil_scoped_release released;
  attention_sm90(a, element, device, stream);
}

}  // namespace

void bind_attention(py::module_& module) {
  module.def("attention_sm90", &run, "attention on compute capability 9.0.");
}
#else
void bind_attention(py::module_&) {}
#endif

}  // namespace bitfuse
