// multi_lora_linear for few tokens: y[m] += s_e x[m] A_e^T B_e^T in place, e the adapter of row m, in one
// launch.
//
// Bound: with few adapters the bytes of their A and B, each read once; with many, the instructions of the
// expansion, which multiplies a whole tile of tokens by each adapter's B though one row of it counts. The
// blocks make h between them (adapter.cuh), having asked L2 for their rows of B, so that memory is never
// idle; then a block takes 32 outputs after the other, its warps every eighth pair of an adapter and a tile
// of its ranks, and adds their sums to y in the order of the warps. Where no row has an adapter a block reads
// the ids and ends.
//
// By count on an H100, 64 rows with an adapter of rank 16 each, N = K = 8192: A and B 33.6 MB, 10 us; then
// the expansion, whose loads from L2 and products follow one another in a warp: about twice that by its
// count.
//
// Shared memory: the groups, then the sums of the warps, [warp][token][32 outputs], in the place of the
// shrink's scratch.
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <string>

#include "cuda/core/launch.cuh"
#include "cuda/linear/adapter.cuh"
#include "cuda/linear/dequant.cuh"
#include "cuda/linear/multi_lora_linear.h"
#include "cuda/ptx/grid_dependency.cuh"

namespace bitfuse {
namespace {

constexpr int Threads = 32 * AdapterWarps;
constexpr int RowTiles = 2;
constexpr int TileRows = 16 * RowTiles;
constexpr int SumPitch = TileRows + 4;  // floats between tokens: tokens 2t.. and rows g fall into 32 banks
constexpr int GroupsBytes = (sizeof(Groups) + 127) / 128 * 128;

constexpr int shared_bytes(int token_tiles) {
  return GroupsBytes + AdapterWarps * 4 * std::max(ScratchFloats, 8 * token_tiles * SumPitch);
}

template <typename T, int TokenTiles>
__global__ void __launch_bounds__(Threads, 2)
    multi_lora_kernel(const __grid_constant__ MultiLoraArgs args,
                      const __grid_constant__ AdapterArgs adapters, const __grid_constant__ Rows rows) {
  extern __shared__ __align__(128) unsigned char shared[];
  Groups& groups = *reinterpret_cast<Groups*>(shared);
  float* const sums = reinterpret_cast<float*>(shared + GroupsBytes);
  constexpr int WarpSums = 8 * TokenTiles * SumPitch;
  const int warp = threadIdx.x / 32, block = blockIdx.x, blocks = gridDim.x;

  wait_for_previous();
  let_next_start();
  if (warp == 0) find_groups(adapters, rows, groups);
  __syncthreads();
  if (groups.count == 0) return;
  for (int row = block * TileRows; row < args.n; row += blocks * TileRows) {
    prefetch_expansion(adapters, groups, args.n, row, TileRows);
  }
  if (block < groups.makers) {
    shrink<T, TokenTiles, false>(adapters, rows, groups, block, sums, ScratchFloats);
  }
  __syncthreads();
  wait_for_h<T, TokenTiles>(adapters, rows, groups, block, sums, ScratchFloats);
  if (threadIdx.x == 0) leave(adapters, groups, block, blocks);

  uint64_t tokens = 0;
  for (int group = 0; group < groups.count; ++group) tokens |= groups.tokens[group];
  for (int row = block * TileRows; row < args.n; row += blocks * TileRows) {
    for (int i = threadIdx.x; i < AdapterWarps * WarpSums; i += Threads) sums[i] = 0;
    __syncthreads();
    expand<RowTiles>(adapters, groups, args.n, row, warp, AdapterWarps, sums + warp * WarpSums, SumPitch);
    __syncthreads();
    for (int i = threadIdx.x; i < args.m * (TileRows / 2); i += Threads) {
      const int token = i / (TileRows / 2), at = 2 * (i % (TileRows / 2));
      if ((tokens >> token & 1) == 0 || row + at >= args.n) continue;
      float2 sum = {0.0f, 0.0f};
#pragma unroll
      for (int other = 0; other < AdapterWarps; ++other) {
        const float2 one = *reinterpret_cast<const float2*>(sums + other * WarpSums + token * SumPitch + at);
        sum.x += one.x, sum.y += one.y;
      }
      T* const y = static_cast<T*>(args.y) + static_cast<int64_t>(token) * args.n + row + at;
      const bool two = row + at + 1 < args.n;
      sum.x += static_cast<float>(y[0]);
      if (two) sum.y += static_cast<float>(y[1]);
      store_two<T>(y, sum, two, args.n % 2 == 0);
    }
    __syncthreads();
  }
}

using KernelFunction = void (*)(MultiLoraArgs, AdapterArgs, Rows);

template <typename T>
constexpr std::array<KernelFunction, 4> by_tokens() {
  return {multi_lora_kernel<T, 1>, multi_lora_kernel<T, 2>, multi_lora_kernel<T, 4>, multi_lora_kernel<T, 8>};
}

constexpr std::array<std::array<KernelFunction, 4>, 2> Kernels = {by_tokens<__half>(),
                                                                  by_tokens<__nv_bfloat16>()};

}  // namespace

void multi_lora_add(const MultiLoraArgs& args, const AdapterArgs& adapters, Float type, int device,
                    std::uintptr_t stream) {
  const DeviceScope scope(device);
  const int log_tiles = args.m <= 8 ? 0 : args.m <= 16 ? 1 : args.m <= 32 ? 2 : 3;
  const int bytes = shared_bytes(1 << log_tiles);
  const KernelFunction function = Kernels[static_cast<int>(type)][log_tiles];
  static AllowedShared allowed[2][4];
  allowed[static_cast<int>(type)][log_tiles].allow(reinterpret_cast<const void*>(function), device, bytes,
                                                   "multi_lora_kernel");
  const Rows rows{args.x, args.x_stride, args.m, args.k};
  launch_early(function, dim3(adapters.participants), Threads, bytes, device,
               reinterpret_cast<cudaStream_t>(stream), args, adapters, rows);
  check(cudaGetLastError(), "multi_lora_kernel<<<" + std::to_string(adapters.participants) + ", " +
                                std::to_string(Threads) + ", " + std::to_string(bytes) + ">>>");
}

}  // namespace bitfuse
