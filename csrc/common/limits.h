// Limits of the kernels that C++, CUDA and Python must agree on. Each extension has them as attributes in
// capitals (kMaxRank is MAX_RANK), which a test compares with Python's own: Python plans where there is no
// extension too.
#pragma once

namespace bitfuse {

constexpr int kMaxRank = 512;       // of an adapter, and of a bottleneck
constexpr int kMaxHeadSize = 256;   // of attention
constexpr int kNestedBlock = 256;   // scales under one second-level scale
constexpr int kNestedLevels = 256;  // values of a nested scale's byte
constexpr int kMaxTokens = 64;      // rows of x that the CUDA kernels for few tokens take

}  // namespace bitfuse
