// How the work of lowbit_linear is cut, and its launch, with or without an adapter. The kernel is in
// lowbit_linear.cuh.
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <limits>
#include <string>
#include <vector>

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

constexpr bool is_power_of_two(int v) { return (v & (v - 1)) == 0; }
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
  DeviceInfo info{get(cudaDevAttrMultiProcessorCount), get(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                  get(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                  10 * get(cudaDevAttrComputeCapabilityMajor) + get(cudaDevAttrComputeCapabilityMinor), 0};
  // two transfers a clock on each wire; both clocks in kHz
  const double bytes = 2.0 * get(cudaDevAttrMemoryClockRate) * get(cudaDevAttrGlobalMemoryBusWidth) / 8;
  info.memory_bytes = bytes / (static_cast<double>(get(cudaDevAttrClockRate)) * info.multiprocessors);
  return info;
}

// What a plan is expected to take, in clocks of a multiprocessor: the largest of what memory, L2, the busiest
// multiprocessor's instructions and its bytes in flight take, then starting, then adding what splits leave.
// No GPU has run it; where each number comes from:
// - memory: the device's (DeviceInfo), 90% of which copies reach.
// - L2: bytes a clock and multiprocessor, of x, of codes and of partial sums; as good on all of them.
// - issue: instructions of a warp for a stage, which is 2 KiB of codes, counted in the machine code of sm_90
//   and by the simulator: those of the decoding, for tiles of 8 tokens: 1, 2, 4, 8; for each 8 numbers of x
//   that a thread copies and orders; and once for a block. 8 warps issue 2.4 a clock, 16 of them 3.0.
// - fixup: the last block waits for memory once, then for L2 once for every four splits, and takes a tile's
//   sums in by itself.
// - flight: a warp has three stages on their way, or as many as it takes, for the latency of loaded memory.
static LowbitLinearExpected expected(const LowbitLinearProblem& p, const LowbitLinearPlan& plan, bool two,
                                     const DeviceInfo& device) {
  constexpr double Reached = 0.9, L2 = 24, Latency = 1000, Start = 2000, Fixup = 1500;
  constexpr double Decode[3][4] = {{380, 380, 440, 660}, {460, 440, 500, 730}, {340, 340, 380, 460}};
  constexpr double Once[] = {250, 500, 700, 1250}, XUnit = 30, IssueOne = 2.4, IssueTwo = 3.0;
  constexpr double FixupRound = 600, FixupBytes = 48;
  const int log_tokens = log2_of(plan.token_tiles), warps_k = Warps >> plan.log_warps_n;
  const int kind = p.code == Code::Int4 ? 0 : p.code == Code::Codebook4 ? 1 : 2;
  const double sms = device.multiprocessors, blocks = static_cast<double>(plan.tiles) * plan.splits;
  const int chunk = chunk_of(p.code), chunks = divide_up(p.k, chunk);
  const int steps = divide_up(divide_up(chunks, plan.splits), warps_k);
  const int busiest = divide_up(plan.tiles * plan.splits, device.multiprocessors);

  LowbitLinearExpected e{};
  const double weights = static_cast<double>(p.n) * chunks * ChunkBytes;
  const double x = 2.0 * p.m * p.k * plan.tiles;
  const double partial = plan.splits > 1 ? 8.0 * plan.splits * p.m * p.n : 0;
  e.memory = weights / (Reached * device.memory_bytes * sms);
  e.l2 = (weights + x + partial) / (L2 * sms);
  const double units = static_cast<double>(p.m) * chunk * warps_k / 8 / Threads;
  const double block = Warps * (steps * (Decode[kind][log_tokens] + XUnit * units) + Once[log_tokens]);
  e.issue = two ? block * (busiest / 2 * 2 / IssueTwo + busiest % 2 / IssueOne) : block * busiest / IssueOne;
  const int at_once = two ? std::min(busiest, 2) : 1;
  e.flight = Latency * steps * busiest / (std::min(steps, Stages - 1) * at_once);
  const int waves = divide_up(busiest, two ? 2 : 1);
  e.start = Start * (1 + (waves - 1) * (two ? 0.3 : 1));  // a later block's start is hidden by its neighbour
  const double sums = 4.0 * p.m * (WarpRows << plan.log_warps_n) * plan.splits;
  e.fixup = plan.splits > 1 ? Fixup + FixupRound * divide_up(plan.splits, 4) + sums / FixupBytes : 0;
  e.fills = blocks >= 0.9 * sms;
  return e;
}

// Blocks of many outputs read x less often; blocks of few are more, so that all multiprocessors have as much
// to do. Splitting k makes more blocks, at the price of partial sums through L2 and of waiting for the last
// block.
std::vector<LowbitLinearPlan> lowbit_linear_plans(const LowbitLinearProblem& p, const DeviceInfo& device) {
  std::vector<LowbitLinearPlan> found;
  const int chunk = chunk_of(p.code), chunks = divide_up(p.k, chunk);
  const int fixed_bytes =
      table_bytes(p.code) + (p.nested ? NestedLevels * 4 : 0) + (p.adapter ? GroupsBytes : 0);
  for (int log_warps_n = 0; log_warps_n <= LogWarps; ++log_warps_n) {
    const int warps_k = Warps >> log_warps_n, tiles = divide_up(p.n, WarpRows << log_warps_n);
    const int most =
        std::min({std::max(1, chunks / warps_k), divide_up(4 * device.multiprocessors, tiles), MostSplits});
    for (int splits = 1; splits <= most; ++splits) {
      LowbitLinearPlan plan{};
      plan.token_tiles = p.m <= 8 ? 1 : p.m <= 16 ? 2 : p.m <= 32 ? 4 : 8;
      plan.log_warps_n = log_warps_n, plan.splits = splits, plan.tiles = tiles;
      const int steps = divide_up(divide_up(chunks, splits), warps_k);
      // two blocks on a multiprocessor hide each other's waits, where registers allow two
      const int half = device.shared_per_multiprocessor / 2 - 1024;
      const bool two =
          plan.token_tiles <= 2 && fit_panels(plan, p.m, steps, chunk, fixed_bytes, p.adapter, half);
      if (!two && !fit_panels(plan, p.m, steps, chunk, fixed_bytes, p.adapter, device.shared_per_block))
        continue;
      plan.expected = expected(p, plan, two, device);
      found.push_back(plan);
    }
  }
  std::stable_sort(found.begin(), found.end(), [](const LowbitLinearPlan& a, const LowbitLinearPlan& b) {
    return a.expected.clocks() < b.expected.clocks();
  });
  return found;
}

// The best by the model; one that leaves a tenth of the multiprocessors or more idle only where memory bounds
// it, or where none that fills them is within what the model may be wrong by.
LowbitLinearPlan plan_lowbit_linear(const LowbitLinearProblem& p, const DeviceInfo& device) {
  constexpr double Doubt = 1.1;
  const std::vector<LowbitLinearPlan> found = lowbit_linear_plans(p, device);
  if (found.empty()) return {};
  const LowbitLinearPlan& best = found.front();
  const LowbitLinearExpected& e = best.expected;
  if (e.fills || e.memory >= std::max(e.issue, e.flight)) return best;
  for (const LowbitLinearPlan& plan : found) {
    if (plan.expected.fills && plan.expected.clocks() <= Doubt * e.clocks()) return plan;
  }
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
  const int warps_k = Warps >> plan.log_warps_n, chunks = divide_up(args.k, chunk);
  kernel.chunks_a_split = chunks / plan.splits, kernel.chunks_left = chunks % plan.splits;
  kernel.inverse_splits = divide_up(1 << LogInverse, plan.splits);
  const bool one_group = args.group_size >= args.k;
  kernel.group_spans = one_group ? std::numeric_limits<int>::max() / 2 : args.group_size / SpanK;
  kernel.log_group_spans = one_group                             ? 31
                           : is_power_of_two(kernel.group_spans) ? log2_of(kernel.group_spans)
                                                                 : -1;
  const int spans_a_step = warps_k * chunk / SpanK;
  kernel.groups_a_step = spans_a_step / kernel.group_spans;
  kernel.spans_a_step = spans_a_step % kernel.group_spans;
  kernel.aligned =
      (reinterpret_cast<std::uintptr_t>(args.qweight) | args.qweight_stride | args.k / 8 * bits_of(code)) %
          16 ==
      0;
  // after which spans of a chunk a group may end, other than at the chunk's end
  const int run = args.group_size >= args.k ? chunk : args.group_size & -args.group_size;
  for (int span = 0; span < chunk / SpanK; ++span) {
    if ((span + 1) * SpanK % std::min(run, chunk) == 0) kernel.flush |= 1 << span;
  }
  const dim3 grid(plan.tiles, plan.splits);
  launch_early(function, grid, Threads, plan.shared_bytes, device, reinterpret_cast<cudaStream_t>(stream),
               kernel);
  check(cudaGetLastError(), "lowbit_linear_kernel<<<(" + std::to_string(grid.x) + ", " +
                                std::to_string(grid.y) + "), " + std::to_string(Threads) + ", " +
                                std::to_string(plan.shared_bytes) + ">>> with " +
                                std::to_string(plan.token_tiles) + " token tiles");
}

}  // namespace bitfuse
