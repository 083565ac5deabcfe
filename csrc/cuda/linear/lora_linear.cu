// lora_linear for few tokens: the kernel of lowbit_linear with an adapter to ride along, see adapter.cuh.
//
// What it costs on an H100 by count, one token, N = K = 8192, int4 in groups of 128, rank 16, beside 12 us
// for W:
// - bytes: W and its scales 34.6 MB, A and B 0.5 MB more, 0.16 us;
// - the shrink: 32 of the 256 blocks take 8 KiB of A each while the copies of their first weights, 2 us'
// worth of
//   a multiprocessor's share of memory, are on their way; what they are late they make up for, since the main
//   loop decodes faster than memory delivers;
// - the expansion: h and B come from L2 in one wait, some 0.3 us, at the end of each block.
// A kernel of its own for the shrink would add its launch, 1 us or more even where the next one starts early.
#include "cuda/linear/lowbit_linear.cuh"

namespace bitfuse {

const KernelTable LoraKernels = by_type<true>();

}  // namespace bitfuse
