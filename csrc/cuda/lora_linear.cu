// lora_linear for few tokens: the kernel of lowbit_linear with an adapter to ride along.
//
// Bytes, at N = K = 8192, int4 in groups of 128, rank 16, one token: W and its scales 34.6 MB, A and B 0.5
// MB, which is 1.5%. Time is lost by launches and by waits, not by bytes, so there is one launch and the
// waits are hidden: see adapter.cuh. What is left in sight is the expansion at the end, some three reads of
// L2 one after the other.
#include "cuda/lowbit_linear.cuh"

namespace bitfuse {

const KernelTable LoraKernels = by_type<true>();

}  // namespace bitfuse
