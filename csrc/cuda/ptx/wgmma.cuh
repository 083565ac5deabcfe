// The tensor-core instructions of four warps together (wgmma, compute capability 9.0a: code for 90a alone).
//
// D [64 x N] += A [64 x 16] B [16 x N], 16-bit operands and float32 sums. Of D a thread has, with g = lane /
// 4 and t = lane % 4, d[4c], d[4c + 1] = (row 16 warp + g, columns 8c + 2t, 8c + 2t + 1), and d[4c + 2], d[4c
// + 3] the same of row g + 8. A lies in shared memory or in registers: a0 = (row g, k 2t, 2t + 1), a1 = (row
// g + 8, the same), a2 and a3 those with k 8 higher; so the sums of columns 16j to 16j + 15 of one product,
// made 16-bit pairs in their order, are A of the next.
//
// They run while the threads go on. D and A's registers, and operands in shared memory, are the program's
// again after wgmma_wait.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace bitfuse {

// Registers written by ordinary instructions can be read by the next wgmma.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most Pending of the groups, the latest ones, run.
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// No instruction for the machine; to the compiler, registers that change here: what reads them stays behind
// the wait before it.
template <int N>
__device__ __forceinline__ void keep_behind(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int N>
__device__ __forceinline__ void keep_behind(uint32_t (&a)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(a[i])::"memory");
}

// How many registers each thread of this warpgroup may have from here on; all its warps say so.
template <int Registers>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// A matrix in shared memory, in rows of 128 bytes swizzled as TMA writes them, 8 rows a kilobyte.
// Rows along M or N, k along a row: 16 k are 32 bytes further; `leading` is not read.
// Rows along k: 16 k are 2048 bytes further, and N's next 64 columns `leading` bytes.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, int leading = 16) {
  constexpr uint64_t Swizzle128 = uint64_t{1} << 62, EightRows = uint64_t{1024 >> 4} << 32;
  return Swizzle128 | EightRows | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(address >> 4 & 0x3fff);
}
// The descriptor of what lies so many bytes further.
__device__ __forceinline__ uint64_t further(uint64_t descriptor, int bytes) {
  return descriptor + static_cast<uint64_t>(bytes >> 4);
}

template <int N>
struct Wgmma;  // of the N below

#define BITFUSE_W8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define BITFUSE_W16 BITFUSE_W8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define BITFUSE_W24 BITFUSE_W16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define BITFUSE_W32 BITFUSE_W24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define BITFUSE_W40 BITFUSE_W32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define BITFUSE_W48 BITFUSE_W40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define BITFUSE_W56 BITFUSE_W48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define BITFUSE_W64 BITFUSE_W56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define BITFUSE_W72 BITFUSE_W64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define BITFUSE_W80 BITFUSE_W72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define BITFUSE_W88 BITFUSE_W80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define BITFUSE_W96 BITFUSE_W88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define BITFUSE_W104 BITFUSE_W96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define BITFUSE_W112 BITFUSE_W104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define BITFUSE_W120 BITFUSE_W112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define BITFUSE_W128 BITFUSE_W120 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define BITFUSE_D8(C, i) \
  C(d[i]), C(d[i + 1]), C(d[i + 2]), C(d[i + 3]), C(d[i + 4]), C(d[i + 5]), C(d[i + 6]), C(d[i + 7])
#define BITFUSE_D32(C, i) BITFUSE_D8(C, i), BITFUSE_D8(C, i + 8), BITFUSE_D8(C, i + 16), BITFUSE_D8(C, i + 24)
#define BITFUSE_ALL32(C) BITFUSE_D32(C, 0)
#define BITFUSE_ALL40(C) BITFUSE_D32(C, 0), BITFUSE_D8(C, 32)
#define BITFUSE_ALL64(C) BITFUSE_D32(C, 0), BITFUSE_D32(C, 32)
#define BITFUSE_ALL88(C) \
  BITFUSE_D32(C, 0), BITFUSE_D32(C, 32), BITFUSE_D8(C, 64), BITFUSE_D8(C, 72), BITFUSE_D8(C, 80)
#define BITFUSE_ALL128(C) BITFUSE_D32(C, 0), BITFUSE_D32(C, 32), BITFUSE_D32(C, 64), BITFUSE_D32(C, 96)

#define BITFUSE_BEGIN(SCALE) \
  "{\n.reg .pred add;\nsetp.ne.b32 add, " SCALE ", 0;\nwgmma.mma_async.sync.aligned.m64n"
// A and B in shared memory, k along the rows of both. C: "+f" adds to d with SCALE "1", "=f" does not with
// "0".
#define BITFUSE_SHARED(N, R, A, B, TYPE, C, SCALE)                                                        \
  asm volatile(BITFUSE_BEGIN(SCALE) #N "k16.f32." TYPE "." TYPE " {" BITFUSE_W##R "}, %" #A ", %" #B      \
                                                                                  ", add, 1, 1, 0, 0;\n}" \
               : BITFUSE_ALL##R(C)                                                                        \
               : "l"(a), "l"(b))
// A in registers, N along the rows of B.
#define BITFUSE_REGISTERS(N, R, A0, A1, A2, A3, B, TYPE)                                \
  asm volatile(BITFUSE_BEGIN("1") #N "k16.f32." TYPE "." TYPE " {" BITFUSE_W##R         \
               "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", add, 1, 1, 1;\n}" \
               : BITFUSE_ALL##R("+f")                                                   \
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b))
#define BITFUSE_WGMMA(N, R, I0, I1, I2, I3, I4)                                                            \
  template <>                                                                                              \
  struct Wgmma<N> {                                                                                        \
    template <typename T, bool Add>                                                                        \
    static __device__ __forceinline__ void shared(float (&d)[R], uint64_t a, uint64_t b) {                 \
      if constexpr (std::is_same_v<T, __half>) {                                                           \
        if constexpr (Add) {                                                                               \
          BITFUSE_SHARED(N, R, I0, I1, "f16", "+f", "1");                                                  \
        } else {                                                                                           \
          BITFUSE_SHARED(N, R, I0, I1, "f16", "=f", "0");                                                  \
        }                                                                                                  \
      } else if constexpr (Add) {                                                                          \
        BITFUSE_SHARED(N, R, I0, I1, "bf16", "+f", "1");                                                   \
      } else {                                                                                             \
        BITFUSE_SHARED(N, R, I0, I1, "bf16", "=f", "0");                                                   \
      }                                                                                                    \
    }                                                                                                      \
    template <typename T>                                                                                  \
    static __device__ __forceinline__ void registers(float (&d)[R], uint32_t a0, uint32_t a1, uint32_t a2, \
                                                     uint32_t a3, uint64_t b) {                            \
      if constexpr (std::is_same_v<T, __half>) {                                                           \
        BITFUSE_REGISTERS(N, R, I0, I1, I2, I3, I4, "f16");                                                \
      } else {                                                                                             \
        BITFUSE_REGISTERS(N, R, I0, I1, I2, I3, I4, "bf16");                                               \
      }                                                                                                    \
    }                                                                                                      \
  }

// N, the registers of D, and the numbers of the operands that follow them
BITFUSE_WGMMA(64, 32, 32, 33, 34, 35, 36);
BITFUSE_WGMMA(80, 40, 40, 41, 42, 43, 44);
BITFUSE_WGMMA(128, 64, 64, 65, 66, 67, 68);
BITFUSE_WGMMA(176, 88, 88, 89, 90, 91, 92);
BITFUSE_WGMMA(256, 128, 128, 129, 130, 131, 132);

#undef BITFUSE_WGMMA
#undef BITFUSE_REGISTERS
#undef BITFUSE_SHARED
#undef BITFUSE_BEGIN
#undef BITFUSE_ALL32
#undef BITFUSE_ALL40
#undef BITFUSE_ALL64
#undef BITFUSE_ALL88
#undef BITFUSE_ALL128
#undef BITFUSE_D32
#undef BITFUSE_D8
#undef BITFUSE_W8
#undef BITFUSE_W16
#undef BITFUSE_W24
#undef BITFUSE_W32
#undef BITFUSE_W40
#undef BITFUSE_W48
#undef BITFUSE_W56
#undef BITFUSE_W64
#undef BITFUSE_W72
#undef BITFUSE_W80
#undef BITFUSE_W88
#undef BITFUSE_W96
#undef BITFUSE_W104
#undef BITFUSE_W112
#undef BITFUSE_W120
#undef BITFUSE_W128

}  // namespace bitfuse
