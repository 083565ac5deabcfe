// Vectors of floats from and to memory of any dtype.
#pragma once

#include "common/types.h"
#include "cpu/isa/contract.h"

namespace bitfuse::BITFUSE_ISA {

// whole: kLanes elements; some: the first `count` < kLanes, nothing past them is touched.
struct Floats {
  using Type = float;
  static BITFUSE_INLINE Vf whole(const float* p) { return load(p); }
  static BITFUSE_INLINE Vf some(const float* p, int count) { return load_first(p, count); }
  static BITFUSE_INLINE void put(float* p, Vf a) { store(p, a); }
};
struct Halfs {
  using Type = uint16_t;
  static BITFUSE_INLINE Vf whole(const uint16_t* p) { return load_half(p); }
  static BITFUSE_INLINE Vf some(const uint16_t* p, int count) { return load_half_first(p, count); }
  static BITFUSE_INLINE void put(uint16_t* p, Vf a) { store_half(p, a); }
};
struct Bfloats {
  using Type = uint16_t;
  static BITFUSE_INLINE Vf whole(const uint16_t* p) { return load_bfloat(p); }
  static BITFUSE_INLINE Vf some(const uint16_t* p, int count) { return load_bfloat_first(p, count); }
  static BITFUSE_INLINE void put(uint16_t* p, Vf a) { store_bfloat(p, a); }
};

template <class Elements>
BITFUSE_INLINE void put_some(typename Elements::Type* p, Vf a, int count) {
  typename Elements::Type buffer[kLanes];
  Elements::put(buffer, a);
  std::memcpy(p, buffer, size_t(count) * sizeof *buffer);
}

template <class F>
BITFUSE_INLINE void with_elements(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(Floats{});
    case Dtype::kFloat16:
      return f(Halfs{});
    case Dtype::kBfloat16:
      return f(Bfloats{});
    default:  // a binding lets none in
      return;
  }
}

}  // namespace bitfuse::BITFUSE_ISA
