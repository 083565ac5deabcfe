// How the work of decode_attention is cut, and its launch. The kernel is in decode_attention.cuh.
#include <cuda_runtime.h>

#include <algorithm>
#include <string>

#include "cuda/attention/decode_attention.cuh"
#include "cuda/core/launch.cuh"

namespace bitfuse {
namespace {

using namespace decode;

template <int D>
using HalfRows = Dense<__half, D>;
template <int D>
using BFloatRows = Dense<__nv_bfloat16, D>;
constexpr InstancesByDim OfRows[2] = {by_dim<HalfRows>(), by_dim<BFloatRows>()};

const Instance* instance_for(const DecodeShape& shape) {
  const int widest = std::max(shape.dim, shape.dim_v);
  const InstancesByDim& of_format = shape.format == CacheFormat::kNone
                                        ? OfRows[static_cast<int>(shape.type)]
                                        : OfCodes[static_cast<int>(shape.format) - 1];
  for (const Instance& one : of_format) {
    if (widest <= one.dim) return &one;
  }
  return nullptr;
}

int divide_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

}  // namespace

// Two blocks on a multiprocessor, which fill each other's waits at the ends of rows, if each has room for
// three stages, else one.
DecodePlan plan_decode_attention(const DecodeShape& shape, const DeviceInfo& device) {
  constexpr int LeastTokens = 128;  // that are worth a block
  DecodePlan plan{};
  plan.shape = shape;
  const Instance* const one = instance_for(shape);
  if (one == nullptr) return plan;
  const int64_t rows = static_cast<int64_t>(shape.heads / shape.kv_heads) * shape.queries;
  plan.row_tiles = divide_up(rows, RowTile);
  plan.sum_bytes = one->sum_bytes[rows > 8];
  const int least_region = plan.sum_bytes + one->tail_bytes;
  auto stages_within = [&](int bytes) {
    const int room = (std::min(bytes, device.shared_per_block) - one->regions_at) / Warps;
    return room < least_region ? 0 : std::min(MostStages, room / one->stage_bytes);
  };
  const int of_two = one->dim <= 128 ? stages_within(device.shared_per_multiprocessor / 2 - 1024) : 0;
  plan.stages = of_two >= 3 ? of_two : stages_within(device.shared_per_block);
  if (plan.stages < 2) return plan;
  plan.dim = one->dim;
  const int region = std::max(plan.stages * one->stage_bytes, least_region);
  plan.shared_bytes = one->regions_at + Warps * region;
  const int unit = Warps * one->tokens;
  plan.least_units = divide_up(LeastTokens, unit);
  plan.counters = shape.batch * shape.kv_heads * plan.row_tiles;
  const int64_t units = static_cast<int64_t>(plan.counters) * (divide_up(shape.capacity, unit) + 1);
  const int64_t most = std::max<int64_t>(1, units / plan.least_units);
  plan.blocks = static_cast<int>(
      std::min<int64_t>(most, static_cast<int64_t>(device.multiprocessors) * (of_two >= 3 ? 2 : 1)));
  plan.partial_floats = 2ll * plan.blocks * (RowTile * one->dim + RowTile * 2);
  return plan;
}

void decode_attention(const DecodeParams& params, const DecodePlan& plan, int device, std::uintptr_t stream) {
  const DeviceCache& cache = params.cache;
  const Instance& one = *instance_for(plan.shape);
  const DeviceScope scope(device);
  static AllowedShared allowed[4][2][Dims];
  const int dim = one.dim == 64 ? 0 : one.dim == 128 ? 1 : 2;
  allowed[static_cast<int>(cache.format)][static_cast<int>(cache.type)][dim].allow(
      reinterpret_cast<const void*>(one.function), device, plan.shared_bytes, "decode_attention_kernel");
  Kernel kernel{};
  kernel.a = params;
  kernel.rows = params.heads / cache.kv_heads * params.queries;
  kernel.row_tiles = plan.row_tiles;
  kernel.sum_bytes = plan.sum_bytes, kernel.stages = plan.stages, kernel.least_units = plan.least_units;
  kernel.region_bytes = (plan.shared_bytes - one.regions_at) / Warps;
  if (has_codes(cache.format)) {
    while (1 << kernel.log_group < cache.group_size) ++kernel.log_group;
    for (int c = 0; c < cache.dim_v; c += 32) kernel.value_groups |= c / cache.channel_group << c / 32 * 4;
  }
  one.function<<<plan.blocks, Threads, plan.shared_bytes, reinterpret_cast<cudaStream_t>(stream)>>>(kernel);
  check(cudaGetLastError(), "decode_attention_kernel<<<" + std::to_string(plan.blocks) + ", " +
                                std::to_string(Threads) + ", " + std::to_string(plan.shared_bytes) +
                                ">>> for head_dim " + std::to_string(one.dim));
}

}  // namespace bitfuse
