// Floats from and to memory of any dtype, a vector or an array at a time.
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

// Floats of `count` elements of any dtype.
inline void to_float(const void* from, Dtype dtype, float* to, int64_t count) {
  if (dtype == Dtype::kFloat32) {
    // vectors and not memcpy, which is slow to start at the few hundred bytes of a row's scales
    const auto* p = static_cast<const float*>(from);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(p + i));
    for (; i < count; ++i) to[i] = p[i];
    return;
  }
  const auto* p = static_cast<const uint16_t*>(from);
  const bool half = dtype == Dtype::kFloat16;
  int64_t i = 0;
  if (half) {
    for (; i + kLanes <= count; i += kLanes) store(to + i, load_half(p + i));
  } else {
    for (; i + kLanes <= count; i += kLanes) store(to + i, load_bfloat(p + i));
  }
  if (i < count) {
    uint16_t words[kLanes] = {};
    float floats[kLanes];
    std::memcpy(words, p + i, size_t(count - i) * 2);
    store(floats, half ? load_half(words) : load_bfloat(words));
    std::memcpy(to + i, floats, size_t(count - i) * 4);
  }
}

inline void from_float(const float* from, void* to, Dtype dtype, int64_t count) {
  if (dtype == Dtype::kFloat32) {
    std::memcpy(to, from, size_t(count) * 4);
    return;
  }
  auto* p = static_cast<uint16_t*>(to);
  const bool half = dtype == Dtype::kFloat16;
  int64_t i = 0;
  if (half) {
    for (; i + kLanes <= count; i += kLanes) store_half(p + i, load(from + i));
  } else {
    for (; i + kLanes <= count; i += kLanes) store_bfloat(p + i, load(from + i));
  }
  if (i < count) {
    float floats[kLanes] = {};
    uint16_t words[kLanes];
    std::memcpy(floats, from + i, size_t(count - i) * 4);
    if (half) {
      store_half(words, load(floats));
    } else {
      store_bfloat(words, load(floats));
    }
    std::memcpy(p + i, words, size_t(count - i) * 2);
  }
}

BITFUSE_INLINE const void* element(const void* p, Dtype dtype, int64_t index) {
  return static_cast<const char*>(p) + index * size_of(dtype);
}
BITFUSE_INLINE void* element(void* p, Dtype dtype, int64_t index) {
  return static_cast<char*>(p) + index * size_of(dtype);
}

}  // namespace bitfuse::BITFUSE_ISA
