// What every instruction set builds on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#define BITFUSE_INLINE inline __attribute__((always_inline))

namespace bitfuse::BITFUSE_ISA {

BITFUSE_INLINE float bfloat_to_float(uint16_t h) {
  uint32_t bits = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Tells the core that this thread waits in a loop.
BITFUSE_INLINE void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr float kE4m3Unit = 256;

}  // namespace bitfuse::BITFUSE_ISA
