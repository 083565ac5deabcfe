// attention on Hopper: which kernel runs, and its launch. The kernel: attention_sm90.cuh.
//
// What bounds it. Of one step (all warpgroups, one tile of keys; no mask, no growth) on one multiprocessor:
// clocks of wgmma at 4096 operations a clock, of ex2 at 16, to issue the compiled loop's instructions at 4;
// and at the tensor cores' full rate, the bytes a clock of shared memory (operands of wgmma, and K and V as
// they come) and of L2. Registers are a consumer's; nothing is spilled, and the producer needs 12 of its 24
// or 32.
//
//   dim  tile       wgmma   ex2  issue (a warp)  shared  L2  registers  bytes of shared memory
//    64  192 x 128   1536  1536   1224 (408)     101     21     160     155968
//   128  128 x 128   2048  1024    842 (421)     112     32     240     229664
//   128  128 x 176   2816  1408   1068 (534)     108     32     240     213248
//   256  128 x 80    2560   640    722 (361)     122     32     240     229632
//
// So the tensor cores are the bound, if the softmax stays beside the products: a warpgroup has half of a
// step's clocks (a third at dim 64) for its own products, and its softmax takes about 230 for the maxima, 8
// for each of a thread's exponentials, and 2 for each pair rounded: 810 of the 1024 that the other's products
// leave it at dim 128. At dim 64 ex2 is as long as wgmma: neither can be idle. Shared memory has 128 bytes a
// clock, which dim 256 all but takes; L2 has about 27, so that 128 queries a tile can't pass 85% of the
// tensor cores' rate. What a tile costs beside its steps, the first softmax and the last rounding that
// nothing hides, is about 2000 clocks: at 16384 keys of dim 128 1 to 3% of the time.
#include <algorithm>
#include <string>

#include "cuda/attention/attention_sm90.cuh"
#include "cuda/attention/attention_sm90.h"

namespace bitfuse {
namespace {

using namespace attention_sm90_detail;

constexpr int64_t SectionBytes = 24 << 20;  // of keys and values that L2 (50 MB, in two halves) keeps

int divide_up(int a, int b) { return (a + b - 1) / b; }

CUtensorMap map_of(CUtensorMapDataType type, const HeadRows& t, int dim, int rows, int heads, int batch,
                   int box_rows) {
  return tensor_map(type, t.data,
                    {static_cast<uint64_t>(dim), static_cast<uint64_t>(rows), static_cast<uint64_t>(heads),
                     static_cast<uint64_t>(batch)},
                    {t.row, t.head, t.batch}, box_rows);
}

template <typename C>
void launch(const AttentionSm90Params& a, int device, cudaStream_t stream) {
  const bool packed = a.cu_seqlens_q != nullptr;
  const CUtensorMapDataType type = std::is_same_v<typename C::T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                         : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const int batch = packed ? 1 : a.batch, q_rows = packed ? a.total_q : a.sq,
            k_rows = packed ? a.total_k : a.sk;
  Call call{};
  call.q = map_of(type, a.q, C::Dim, q_rows, a.heads, batch, C::TileM);
  call.k = map_of(type, a.k, C::Dim, k_rows, a.kv_heads, batch, C::TileN);
  call.v = map_of(type, a.v, C::Dim, k_rows, a.kv_heads, batch, C::TileN);
  call.out = a.out, call.lse = a.lse, call.counters = a.counters;
  call.cu_seqlens_q = a.cu_seqlens_q, call.cu_seqlens_k = a.cu_seqlens_k, call.sinks = a.sinks;
  call.sq = a.sq, call.sk = a.sk, call.total_q = a.total_q, call.total_k = a.total_k;
  call.heads = a.heads, call.kv_heads = a.kv_heads, call.group = a.heads / a.kv_heads, call.batch = a.batch;
  call.left = a.left, call.right = a.right, call.bottom = a.top_left ? 0 : 1;
  call.row_tiles = divide_up(a.sq, C::TileM);
  call.tiles = call.row_tiles * a.heads * a.batch;
  const int64_t head_bytes = 4 * static_cast<int64_t>(a.sk) * C::Dim;
  call.section = static_cast<int>(std::clamp<int64_t>(SectionBytes / head_bytes, 1, a.batch * a.kv_heads));
  constexpr float Log2E = 1.4426950408889634f;
  call.scale = (C::Capped ? a.softcap : a.scale) * Log2E;
  call.sink_scale = Log2E / call.scale;
  if (C::Capped)
    call.before_cap = a.scale / a.softcap * (std::is_same_v<typename C::T, __half> ? 2 * Log2E : 1);

  const auto kernel = attention_sm90_kernel<C>;
  static AllowedShared allowed;
  allowed.allow(reinterpret_cast<const void*>(kernel), device, C::SharedBytes, "attention_sm90_kernel");
  const int grid = std::min(call.tiles, a.multiprocessors);
  kernel<<<grid, C::Threads, C::SharedBytes, stream>>>(call);
  check(cudaGetLastError(), "attention_sm90_kernel<<<" + std::to_string(grid) + ", " +
                                std::to_string(C::Threads) + ", " + std::to_string(C::SharedBytes) +
                                ">>> of dim " + std::to_string(C::Dim) + " and " + std::to_string(C::TileN) +
                                " keys a tile");
}

// Wide tiles of keys cost less a key, but a window's edge and the end of the keys waste more of them.
bool wide_tiles(const AttentionSm90Params& a) {
  const int64_t wide = divide_up(a.sk, 176) * int64_t{176}, narrow = divide_up(a.sk, 128) * int64_t{128};
  return a.softcap == 0 && a.left >= a.sk && a.right >= a.sk && 95 * wide <= 100 * narrow;
}

template <typename T, bool Capped>
void launch_dim(const AttentionSm90Params& a, int device, cudaStream_t stream) {
  switch (a.dim) {
    case 64:
      return launch<Tiling<T, 64, 3, 128, 4, Capped>>(a, device, stream);
    case 128:
      if constexpr (!Capped) {
        if (wide_tiles(a)) return launch<Tiling<T, 128, 2, 176, 2, false>>(a, device, stream);
      }
      return launch<Tiling<T, 128, 2, 128, 3, Capped>>(a, device, stream);
    default:
      return launch<Tiling<T, 256, 2, 80, 2, Capped>>(a, device, stream);
  }
}

template <typename T>
void launch_type(const AttentionSm90Params& a, int device, cudaStream_t stream) {
  a.softcap == 0 ? launch_dim<T, false>(a, device, stream) : launch_dim<T, true>(a, device, stream);
}

}  // namespace

void attention_sm90(const AttentionSm90Params& params, Float type, int device, std::uintptr_t stream) {
  const DeviceScope scope(device);
  const auto queue = reinterpret_cast<cudaStream_t>(stream);
  type == Float::Float16 ? launch_type<__half>(params, device, queue)
                         : launch_type<__nv_bfloat16>(params, device, queue);
}

}  // namespace bitfuse
