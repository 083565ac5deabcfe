// The kernels of decode_attention for caches in few bits.
#include "cuda/attention/decode_attention.cuh"

namespace bitfuse::decode {
namespace {

template <int D>
using Fp8Codes = Codes<8, false, D>;
template <int D>
using Int8Codes = Codes<8, true, D>;
template <int D>
using Int4Codes = Codes<4, true, D>;

}  // namespace

const InstancesByDim OfCodes[3] = {by_dim<Fp8Codes>(), by_dim<Int8Codes>(), by_dim<Int4Codes>()};

}  // namespace bitfuse::decode
