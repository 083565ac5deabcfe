// Adapters of a product on CUDA, y[m] += s_e h[m] B_e^T with h[m] = x[m] A_e^T and e the adapter of row m:
// what the bindings and the kernels agree on. No CUDA header is needed to read this.
#pragma once

#include <cstdint>

namespace bitfuse {

enum class AdapterFloat : int { Float32, Float16, BFloat16 };

constexpr int AdapterMaxTokens = 64;
constexpr int AdapterMaxRank = 512;
constexpr int RankTile = 16;                   // ranks of a tensor-core tile: the unit that work is cut into
constexpr int AdapterTileSums = 8 * RankTile;  // of a tile of ranks and one of 8 tokens

// Tensors as addresses, all contiguous.
struct AdapterArgs {
  const void* lora_a;    // stacked [adapters, rank, k]; null: by the table
  const void* lora_b;    // stacked [adapters, n, rank]
  const int64_t* table;  // [3, adapters]: addresses of each A [rank_e, k] and B [n, rank_e], ranks
  const void* ids;       // [m] int32 or int64; null: adapter 0 for every row. One that is not there is none
  const float* scaling;  // [adapters]; null: 1
  float scaling_by;      // times this
  float* h;              // [m, rank], written
  float* partial;        // [participants, tiles of 8 tokens, AdapterTileSums]
  // Zero before and after: how far the launch is (see adapter.cuh), and the slices of k that are there of
  // each pair of an adapter and a tile of its ranks.
  unsigned long long* state;
  unsigned* counters;
  int adapters, rank;  // rank: the largest
  int participants;    // the first so many blocks make h, 1 or more
  AdapterFloat a_type, b_type;
  bool ids_are_64_bit;
};

}  // namespace bitfuse
