// lowbit_linear on CUDA: what the binding and the kernels agree on. No CUDA header is needed to read this.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/linear/adapter.h"

namespace bitfuse {

enum class Float : int { Float16, BFloat16 };
enum class Code : int { Int4, Codebook4, Int8, Fp8 };
enum class ScaleType : int { Float32, Float16, BFloat16, E8M0, Nested };

// Tensors as addresses, strides in elements. x [m, k], qweight [n, k * bits / 8], scales and zeros
// [ceil(n / 2^log_scale_rows), groups], y [m, n].
struct LowbitLinearArgs {
  const void* x;
  const unsigned char* qweight;
  const void* scales;
  const unsigned char* zeros;  // null: zero_point
  const void* offsets;         // of offset_type, the shape of zeros and in their place; null: none
  const float* scale_scales;   // with scale_offset and nested_levels: nested scales only
  const float* scale_offset;
  const float* nested_levels;  // the 256 values of a nested scale's code
  const void* pairs;           // of a codebook: the two levels of each byte, of x's type, [256, 4, 2]
  const void* bias;            // null: none
  const float* out_scale;      // [n], times the sums before the bias; null: 1
  void* y;
  float* partial;      // [splits, m, n, and one more where n is odd], when splits > 1
  unsigned* counters;  // one a tile, zero before and after, when splits > 1
  int64_t x_stride, qweight_stride;
  int m, n, k, group_size, groups, scales_stride, zeros_stride, zero_point;
  int last_scale, last_zero;  // places of the last ones, in elements; of zeros or of offsets
  int log_scale_rows;         // of the rows that share a scale: 0, or such that a warp's do
  ScaleType scale_type, offset_type;
};

// A product as its plan sees it.
struct LowbitLinearProblem {
  int m, n, k;
  Code code;
  bool nested, adapter;  // nested scales; an adapter rides along
};

// What a plan is expected to take, in clocks of a multiprocessor.
struct LowbitLinearExpected {
  double memory, l2, issue, flight;  // which happen at once
  double start, fixup;               // of blocks; of sums of splits
  bool fills;                        // nine in ten multiprocessors or more have a block

  double clocks() const {
    const double a = memory > l2 ? memory : l2, b = issue > flight ? issue : flight;
    return (a > b ? a : b) + start + fixup;
  }
};

// How the work is cut.
struct LowbitLinearPlan {
  int token_tiles;    // tiles of 8 tokens that a warp holds: 1, 2, 4 or 8
  int log_warps_n;    // of the block's 8 warps, how many stand side by side in n; the others split k
  int splits;         // blocks that split k
  int log_panel;      // chunks of each warp in a panel of x
  int panel_buffers;  // panels of x in shared memory
  int shared_bytes;
  int tiles;  // of n
  LowbitLinearExpected expected;
};

struct DeviceInfo {
  int multiprocessors;
  int shared_per_block;
  int shared_per_multiprocessor;
  int capability;       // 10 * major + minor
  double memory_bytes;  // of memory, by its data sheet, that a multiprocessor is given a clock
};

constexpr int LowbitLinearMaxTokens = 64;
constexpr int LowbitLinearWarpRows = 32;  // outputs of a warp

DeviceInfo device_info(int device);
// The architectures that the kernels were compiled for, as nvcc lists them: "800,900".
const char* architectures();
// All that the kernel can run on the device, the best first by the model of lowbit_linear.cu.
std::vector<LowbitLinearPlan> lowbit_linear_plans(const LowbitLinearProblem& problem,
                                                  const DeviceInfo& device);
// One of them; of token_tiles 0 where there is none.
LowbitLinearPlan plan_lowbit_linear(const LowbitLinearProblem& problem, const DeviceInfo& device);
// Queues the kernel, with or without an adapter to ride along. Throws std::runtime_error with the launch's
// shape when CUDA refuses it.
void lowbit_linear(const LowbitLinearArgs& args, const LowbitLinearPlan& plan, Float type, Code code,
                   int device, std::uintptr_t stream, const AdapterArgs* adapter = nullptr);

}  // namespace bitfuse
