// The levels that the CPU kernels are compiled for, once: the enum, each op's declarations, the choice at run
// time, the compiler's flags (bitfuse_tools/compile/toolchain.py reads this file) and the tests' list all come
// from here. A new level is a row, and a header of its name beside this file.
//
// A row: LEVEL(name, what the machine must have beyond the row above, ...), the narrowest first; what follows
// is handed on from BITFUSE_LEVELS(LEVEL, ...). CPU_HAS(x) is a feature as compilers name it: -mx asks for it.
#pragma once

#define BITFUSE_LEVELS_X86_64(LEVEL, ...)                                                        \
  LEVEL(portable, true, __VA_ARGS__)                                                             \
  LEVEL(avx2, CPU_HAS(avx2) && CPU_HAS(fma) && CPU_HAS(f16c), __VA_ARGS__)                       \
  LEVEL(avx512, CPU_HAS(avx512f) && CPU_HAS(avx512bw) && CPU_HAS(avx512dq) && CPU_HAS(avx512vl), \
        __VA_ARGS__)                                                                             \
  LEVEL(avx512bf16, CPU_HAS(avx512vnni) && CPU_HAS(avx512bf16), __VA_ARGS__)

// every machine of 64 bits has NEON
#define BITFUSE_LEVELS_AARCH64(LEVEL, ...) \
  LEVEL(portable, true, __VA_ARGS__)       \
  LEVEL(neon, true, __VA_ARGS__)

#define BITFUSE_LEVELS_OTHER(LEVEL, ...) LEVEL(portable, true, __VA_ARGS__)

#if defined(__x86_64__)
#define BITFUSE_LEVELS BITFUSE_LEVELS_X86_64
#elif defined(__aarch64__)
#define BITFUSE_LEVELS BITFUSE_LEVELS_AARCH64
#else
#define BITFUSE_LEVELS BITFUSE_LEVELS_OTHER
#endif
