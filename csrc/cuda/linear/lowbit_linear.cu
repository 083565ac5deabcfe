// How the work of lowbit_linear is cut, and its launch, with or without an adapter. The kernel is in
// lowbit_linear.cuh.
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string>

#include "cuda/core/launch.cuh"
#include "cuda/linear/lowbit_linear.cuh"
#include "cuda/linear/lowbit_linear.h"

namespace bitfuse {
namespace {

constexpr KernelTable Kernels = by_type<false>();

constexpr int log2_of(int power) {
  int log = 0;
  while (1 << log < power) ++log;
  return log;
}

int bits_of(Code code) { return code == Code::Int4 || code == Code::Codebook4 ? 4 : 8; }
int chunk_of(Code code) { return ChunkBytes * 8 / bits_of(code); }
int table_bytes(Code code) { return code == Code::Codebook4 ? Codebook4<__half>::TableBytes : 0; }
int divide_up(int a, int b) { return (a + b - 1) / b; }

// Panels of x for a block that takes `steps` chunks a warp: all of x if it fits, else as much as fits. A
// panel is asked for panel_buffers - 1 panels ahead, which must be Stages - 1 steps or more, or the weights
// would wait for it.
bool fit_panels(LowbitLinearPlan& plan, int m, int steps, int chunk, int fixed_bytes, bool adapter,
                int limit) {
  const int warps_k = Warps >> plan.log_warps_n;
  const int sums = sum_bytes(plan.token_tiles) + (adapter ? Warps * ScratchFloats * 4 : 0);
  auto fits = [&](int log_panel, int buffers) {
    const int64_t panel = static_cast<int64_t>(panel_tokens(m, plan.token_tiles)) * chunk * warps_k * 2
                          << log_panel;
    const int64_t bytes = fixed_bytes + std::max<int64_t>(RingBytes + panel * buffers, sums);
    if (bytes > limit) return false;
    plan.log_panel = log_panel, plan.panel_buffers = buffers, plan.shared_bytes = static_cast<int>(bytes);
    return true;
  };
  const int whole = log2_of(steps);
  if (fits(whole, 1)) return true;
  for (int log = whole - 1; log >= 0; --log) {
    if (fits(log, 1 + divide_up(Stages - 1, 1 << log))) return true;
  }
  return false;
}

}  // namespace

#define BITFUSE_TEXT_OF(...) #__VA_ARGS__
#define BITFUSE_TEXT(...) BITFUSE_TEXT_OF(__VA_ARGS__)
const char* architectures() { return BITFUSE_TEXT(__CUDA_ARCH_LIST__); }

DeviceInfo device_info(int device) {
  auto get = [device](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
    return value;
  };
  return {get(cudaDevAttrMultiProcessorCount), get(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          get(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
          10 * get(cudaDevAttrComputeCapabilityMajor) + get(cudaDevAttrComputeCapabilityMinor)};
}

// The cut that a simple model of time likes best. Its unit is a clock of an H100; rates are bytes of codes
// that a multiprocessor takes a clock, a 1/132 of memory's or L2's, or what its instructions and mma.sync let
// through with one block of 8 warps on it, or two (counted in the loop's machine code: 9 instructions for 8
// codes of int4, at 2.4 and 4 a clock). Other devices have other clocks, but much the same ratios.
// - Blocks of many outputs read x less often; blocks of few are more, so that all multiprocessors have as
// much to do.
// - Splitting k makes more blocks, at the price of partial sums through L2 and of waiting for the last block.
// - A block's warps that split k should have equal numbers of chunks.
LowbitLinearPlan plan_lowbit_linear(int m, int n, int k, Code code, bool nested, const DeviceInfo& device,
                                    bool adapter) {
  constexpr double Memory = 13, L2 = 24, Start = 1500, Fixup = 2500;
  constexpr double OneBlock[] = {17, 16, 14, 8.5},
                   TwoBlocks[] = {28, 25, 0, 0};  // by tiles of 8 tokens: 1, 2, 4, 8
  LowbitLinearPlan best{};
  best.token_tiles = m <= 8 ? 1 : m <= 16 ? 2 : m <= 32 ? 4 : 8;
  const int log_tokens = log2_of(best.token_tiles);
  const double sms = device.multiprocessors, codes_a_byte = 8.0 / bits_of(code);
  const int chunk = chunk_of(code), chunks = divide_up(k, chunk);
  const int fixed_bytes = table_bytes(code) + (nested ? NestedLevels * 4 : 0) + (adapter ? GroupsBytes : 0);
  const double weight_bytes = static_cast<double>(n) * chunks * ChunkBytes;
  double best_time = std::numeric_limits<double>::infinity();
  for (int log_warps_n = 0; log_warps_n <= log2_of(Warps); ++log_warps_n) {
    const int rows = WarpRows << log_warps_n, warps_k = Warps >> log_warps_n;
    const int tiles = divide_up(n, rows);
    const int most =
        std::min({std::max(1, chunks / warps_k), divide_up(4 * device.multiprocessors, tiles), 64});
    for (int splits = 1; splits <= most; ++splits) {
      LowbitLinearPlan plan = best;
      plan.log_warps_n = log_warps_n, plan.splits = splits, plan.tiles = tiles;
      const int steps = divide_up(divide_up(chunks, splits), warps_k);
      // two blocks on a multiprocessor hide each other's waits, where registers allow two
      const int half = device.shared_per_multiprocessor / 2 - 1024;
      const bool two = plan.token_tiles <= 2 && fit_panels(plan, m, steps, chunk, fixed_bytes, adapter, half);
      if (!two && !fit_panels(plan, m, steps, chunk, fixed_bytes, adapter, device.shared_per_block)) continue;
      const int busiest = divide_up(tiles * splits, device.multiprocessors);
      const double block = static_cast<double>(rows) * steps * warps_k * ChunkBytes * codes_a_byte / 2;
      const double one_by_one = block / OneBlock[log_tokens];
      const double work = two ? busiest / 2 * 2 * block / TwoBlocks[log_tokens] + busiest % 2 * one_by_one
                              : busiest * one_by_one;
      const double x_bytes = 2.0 * m * k * tiles, partial_bytes = splits > 1 ? 8.0 * splits * m * n : 0;
      const double traffic = (weight_bytes + x_bytes + partial_bytes) / (L2 * sms);
      const double starts =
          two ? 1 + 0.3 * (divide_up(busiest, 2) - 1) : busiest;  // not hidden by another block
      const double time = std::max({weight_bytes / (Memory * sms), work, traffic}) + Start * starts +
                          (splits > 1 ? Fixup : 0);
      if (time < best_time) best_time = time, best = plan;
    }
  }
  if (!std::isfinite(best_time)) best.token_tiles = 0;
  return best;
}

void lowbit_linear(const LowbitLinearArgs& args, const LowbitLinearPlan& plan, Float type, Code code,
                   int device, std::uintptr_t stream, const AdapterArgs* adapter) {
  const DeviceScope scope(device);
  const bool rides = adapter != nullptr, offsets = args.offsets != nullptr;
  const int of_type = static_cast<int>(type), log_tokens = log2_of(plan.token_tiles);
  const KernelFunction function =
      offsets ? OffsetKernels[rides][of_type][code == Code::Int8][log_tokens]
              : (rides ? LoraKernels : Kernels)[of_type][static_cast<int>(code)][log_tokens];
  static AllowedShared allowed[2][2][2][4][4];
  allowed[offsets][rides][of_type][static_cast<int>(code)][log_tokens].allow(
      reinterpret_cast<const void*>(function), device, plan.shared_bytes, "lowbit_linear_kernel");

  const int chunk = chunk_of(code);
  Kernel kernel{};
  kernel.a = args;
  if (rides) kernel.adapter = *adapter;
  kernel.rows = {args.x, args.x_stride, args.m, args.k};
  kernel.log_warps_n = plan.log_warps_n, kernel.log_panel = plan.log_panel;
  kernel.panel_buffers = plan.panel_buffers, kernel.splits = plan.splits;
  kernel.nested_offset = table_bytes(code);
  kernel.groups_offset = kernel.nested_offset + (args.scale_type == ScaleType::Nested ? NestedLevels * 4 : 0);
  kernel.ring_offset = kernel.groups_offset + (rides ? GroupsBytes : 0);
  // after which spans of a chunk a group may end, other than at the chunk's end
  const int run = args.group_size >= args.k ? chunk : args.group_size & -args.group_size;
  for (int span = 0; span < chunk / SpanK; ++span) {
    if ((span + 1) * SpanK % std::min(run, chunk) == 0) kernel.flush |= 1 << span;
  }
  const dim3 grid(plan.tiles, plan.splits);
  function<<<grid, Threads, plan.shared_bytes, reinterpret_cast<cudaStream_t>(stream)>>>(kernel);
  check(cudaGetLastError(), "lowbit_linear_kernel<<<(" + std::to_string(grid.x) + ", " +
                                std::to_string(grid.y) + "), " + std::to_string(Threads) + ", " +
                                std::to_string(plan.shared_bytes) + ">>> with " +
                                std::to_string(plan.token_tiles) + " token tiles");
}

}  // namespace bitfuse
