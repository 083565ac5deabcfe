// AdamW with moments in 8 bits: one pass over p, the gradient and two bytes of codes.
//
// Bytes a parameter: p read and written, g read, two codes read and written: 16 in float32, 10 with p and g
// in bfloat16, and 4 floats a block. What bounds it is that traffic, as long as the arithmetic keeps up: some
// 65 vector operations for kLanes parameters, with a square root and a division among them, so nothing here
// may look up a table of 256 or search among 255 midpoints.
//
// A map is nine segments of evenly spaced values: 0, seven decades, 1. Decade d holds 2^b codes, b = d for
// the signed map and d + 1 for the unsigned one, and codes counted from 0 so fall into powers of two: the
// exponent of the code, as a float, is the segment, and what is left of its mantissa is the place in it. The
// other way, the exponent of the number gives the segment up to one (a decade is more than three powers of
// two), one comparison with the segment's top settles it, and one multiply-add gives the code. A handful of
// 16-entry tables in registers serves all of that. In the unsigned map only 0 has the code of 0: a second
// moment rounded to 0 would make a step of m / eps.
//
// A block goes through twice. The first pass updates moments and p, and leaves the moments in 2 * block
// floats of stack, in the first-level cache, with their largest magnitude; the second pass writes the codes.
// The last block, when it is short, goes through a padded copy.
#include "cpu/optim/adamw8bit.h"

#include <cfloat>
#include <cmath>
#include <cstring>

#include "cpu/core/elements.h"
#include "cpu/core/threads.h"
#include "cpu/isa/contract.h"

namespace bitfuse::BITFUSE_ISA {
namespace {

// Lanes as GCC's vectors, for comparisons, selections and conversions: the same source at every level.
typedef float Floats __attribute__((vector_size(sizeof(Vf))));
typedef int32_t Dwords __attribute__((vector_size(sizeof(Vf))));
typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

BITFUSE_INLINE Floats floats(Vf a) { return (Floats)a; }
BITFUSE_INLINE Dwords bits(Floats a) { return (Dwords)a; }

constexpr int kSegments = 9;
constexpr int kQuarterOffset = 15;  // exponent field & 15 of a float in [1, 2)

// The dynamic map (Dettmers et al., 2021) as segments. Values are computed in double and rounded once.
template <bool Signed>
struct Segments {
  double base[kSegments], step[kSegments], top[kSegments];
  int first[kSegments], last[kSegments];

  constexpr Segments() : base{}, step{}, top{}, first{}, last{} {
    double power = 1e-6;
    int code = 0;
    for (int s = 0; s < kSegments; ++s) {
      const bool decade = s > 0 && s < kSegments - 1;
      const int count = decade ? 1 << (s - (Signed ? 1 : 0)) : 1;
      step[s] = decade ? power * 0.9 / count : 0;
      base[s] = decade ? power * 0.1 + step[s] / 2 : s ? 1 : 0;
      first[s] = code;
      last[s] = code + count - 1;
      code += count;
      if (decade) power *= 10;
    }
    for (int s = 0; s + 1 < kSegments; ++s) {
      const double highest = base[s] + (last[s] - first[s]) * step[s];
      top[s] = !Signed && s == 0 ? FLT_MIN : (highest + base[s + 1]) / 2;
    }
  }
};

// Codes are counted from that of 0, and shifted so that segment s > 0 begins at a power of two: the signed
// map by nothing, the unsigned one by 1. A quarter on top tells 0 from 1.
template <bool Signed>
struct Map {
  static constexpr Segments<Signed> kMap{};
  static constexpr float kShift = (Signed ? 0.0f : 1.0f) + 0.25f;
  static constexpr int kZero = Signed ? 127 : 0;

  struct Tables {
    float decode_step[16] = {}, decode_base[16] = {};
    float top[16], encode_scale[16] = {}, encode_base[16] = {}, encode_last[16] = {};
    Tables() {
      for (int s = 0; s < kSegments; ++s) {
        // the exponent field of (code + kShift), low four bits
        const int exponent = Signed && s == 0 ? kQuarterOffset - 2 : (kQuarterOffset + s - (Signed ? 1 : 0));
        decode_step[exponent & 15] = float(kMap.step[s]);
        decode_base[exponent & 15] = float(kMap.base[s] - 0.25 * kMap.step[s]);
        // code = first + 1/2 + (x - base) / step, rounded down
        const double scale = kMap.step[s] > 0 ? 1 / kMap.step[s] : 0;
        encode_scale[s] = float(scale);
        encode_base[s] = float(kMap.first[s] + 0.5 - kMap.base[s] * scale);
        encode_last[s] = float(kMap.last[s]);
      }
      for (int s = 0; s < 16; ++s) top[s] = s + 1 < kSegments ? float(kMap.top[s]) : INFINITY;
    }
  };
  static const Tables& tables() {
    static const Tables made;
    return made;
  }

  Table16 decode_step, decode_base, top, encode_scale, encode_base, encode_last;
  Map()
      : decode_step(tables().decode_step),
        decode_base(tables().decode_base),
        top(tables().top),
        encode_scale(tables().encode_scale),
        encode_base(tables().encode_base),
        encode_last(tables().encode_last) {}

  // The values of kLanes codes, of the map itself: scales are the caller's.
  BITFUSE_INLINE Floats decode(const uint8_t* codes) const {
    const Floats code = __builtin_convertvector((Dwords)spread_bytes(codes), Floats);
    const Floats place = code - float(kZero);
    const Dwords sign = Signed ? bits(place) & INT32_MIN : Dwords{};
    const Floats y = (Floats)(bits(place) ^ sign) + kShift;
    const Floats power = (Floats)(bits(y) & 0x7f800000);
    const Vi segment = (Vi)(bits(y) >> 23);
    const Vf value = fma((Vf)(y - power), decode_step[segment], decode_base[segment]);
    return (Floats)(bits(floats(value)) | sign);
  }

  // The nearest codes of kLanes numbers in [-1, 1] (unsigned: [0, 1]); for a NaN, some code.
  BITFUSE_INLINE void encode(Floats x, uint8_t* codes) const {
    const Dwords sign = bits(x) & INT32_MIN;
    const Floats size = (Floats)(bits(x) ^ sign);
    // floor(log10(2^exponent) + 7.4), never above the segment of size nor more than one below it
    Dwords segment = ((bits(size) >> 23) * 77 + (1894 - 127 * 77)) >> 8;
    segment = segment > 0 ? segment : 0;
    segment -= size >= floats(top[(Vi)segment]);
    const Vi at = (Vi)segment;
    Floats place = floats(fma((Vf)size, encode_scale[at], encode_base[at]));
    const Floats last = floats(encode_last[at]);
    place = place < last ? place : last;
    Dwords code = __builtin_convertvector(place, Dwords);
    if (Signed) {
      code = kZero + (sign ? -code : code);
      code = code > 0 ? code : 0;  // there is a 1 and no -1
    } else {
      const Dwords least_code = segment > 0 ? Dwords{} + 1 : Dwords{};
      code = code > least_code ? code : least_code;
    }
    const Bytes narrow = __builtin_convertvector(code, Bytes);
    std::memcpy(codes, &narrow, kLanes);
  }
};

template <Dtype D>
struct Element;
template <>
struct Element<Dtype::kFloat32> {
  using Type = float;
  static BITFUSE_INLINE Vf get(const float* p) { return load(p); }
  static BITFUSE_INLINE void put(float* p, Vf a) { store(p, a); }
};
template <>
struct Element<Dtype::kFloat16> {
  using Type = uint16_t;
  static BITFUSE_INLINE Vf get(const uint16_t* p) { return load_half(p); }
  static BITFUSE_INLINE void put(uint16_t* p, Vf a) { store_half(p, a); }
};
template <>
struct Element<Dtype::kBfloat16> {
  using Type = uint16_t;
  static BITFUSE_INLINE Vf get(const uint16_t* p) { return load_bfloat(p); }
  static BITFUSE_INLINE void put(uint16_t* p, Vf a) { store_bfloat(p, a); }
};

// The bits of the largest magnitude so far, lane by lane: as integers, a NaN is above everything.
BITFUSE_INLINE Dwords larger(Dwords so_far, Floats a) {
  const Dwords size = bits(a) & INT32_MAX;
  return so_far > size ? so_far : size;
}
BITFUSE_INLINE float largest(Dwords lanes) {
  int32_t most = 0;
  for (int i = 0; i < kLanes; ++i) most = lanes[i] > most ? lanes[i] : most;
  float f;
  std::memcpy(&f, &most, 4);
  return f;
}
// Below the smallest normal number the reciprocal may not exist: such a block is all zeros.
BITFUSE_INLINE float reciprocal(float absmax) { return absmax >= FLT_MIN ? 1 / absmax : 0; }

template <Dtype P, Dtype G>
BITFUSE_INLINE void update_block(const AdamW8bitArgs& call, const Map<true>& m_map, const Map<false>& v_map,
                                 typename Element<P>::Type* p, const typename Element<G>::Type* g,
                                 uint8_t* m_codes, uint8_t* v_codes, float* m_absmax, float* v_absmax,
                                 int64_t count) {
  alignas(64) float m_kept[kMaxOptimizerBlock], v_kept[kMaxOptimizerBlock];
  const Vf beta1 = set1(call.beta1), beta2 = set1(call.beta2);
  const Vf rest1 = set1(call.rest1), rest2 = set1(call.rest2);
  const Floats m_scale = floats(set1(*m_absmax)), v_scale = floats(set1(*v_absmax));
  Dwords m_most{}, v_most{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vf grad = Element<G>::get(g + i);
    const Vf m = fma(beta1, (Vf)(m_map.decode(m_codes + i) * m_scale), mul(rest1, grad));
    const Vf v = fma(beta2, (Vf)(v_map.decode(v_codes + i) * v_scale), mul(rest2, mul(grad, grad)));
    store(m_kept + i, m);
    store(v_kept + i, v);
    m_most = larger(m_most, floats(m));
    v_most = larger(v_most, floats(v));
    const Floats denominator = floats(square_root(v)) * call.inverse_correction + call.eps;
    const Vf change = (Vf)(floats(m) / denominator);
    Element<P>::put(p + i, fma(set1(-call.step_size), change, mul(set1(call.decay), Element<P>::get(p + i))));
  }
  *m_absmax = largest(m_most);
  *v_absmax = largest(v_most);
  const float m_inverse = reciprocal(*m_absmax), v_inverse = reciprocal(*v_absmax);
  for (int64_t i = 0; i < count; i += kLanes) {
    m_map.encode(floats(load(m_kept + i)) * m_inverse, m_codes + i);
    v_map.encode(floats(load(v_kept + i)) * v_inverse, v_codes + i);
  }
}

template <Dtype P, Dtype G>
void update(const AdamW8bitArgs& call) {
  using Parameter = typename Element<P>::Type;
  using Gradient = typename Element<G>::Type;
  const int64_t blocks = (call.count + call.block - 1) / call.block;
  // an update costs as much as some 8 multiply-adds
  parallel(int(least(threads_for(8 * call.count), blocks)), [&](int thread, int threads) {
    const Map<true> m_map;
    const Map<false> v_map;
    auto* p = static_cast<Parameter*>(call.p);
    auto* g = static_cast<const Gradient*>(call.g);
    const Range mine = share(blocks, thread, threads);
    for (int64_t b = mine.begin; b < mine.end; ++b) {
      const int64_t at = b * call.block, count = least(call.block, call.count - at);
      if (count == call.block) {
        update_block<P, G>(call, m_map, v_map, p + at, g + at, call.m + at, call.v + at, call.m_absmax + b,
                           call.v_absmax + b, count);
      } else {
        Parameter p_end[kMaxOptimizerBlock];
        Gradient g_end[kMaxOptimizerBlock];
        uint8_t m_end[kMaxOptimizerBlock], v_end[kMaxOptimizerBlock];
        const int64_t whole = round_up(count, kLanes);
        // past the end: zeros, which stay zeros
        std::memset(p_end + count, 0, (whole - count) * sizeof(Parameter));
        std::memset(g_end + count, 0, (whole - count) * sizeof(Gradient));
        std::memset(m_end + count, Map<true>::kZero, whole - count);
        std::memset(v_end + count, Map<false>::kZero, whole - count);
        std::memcpy(p_end, p + at, count * sizeof(Parameter));
        std::memcpy(g_end, g + at, count * sizeof(Gradient));
        std::memcpy(m_end, call.m + at, count);
        std::memcpy(v_end, call.v + at, count);
        update_block<P, G>(call, m_map, v_map, p_end, g_end, m_end, v_end, call.m_absmax + b,
                           call.v_absmax + b, whole);
        std::memcpy(p + at, p_end, count * sizeof(Parameter));
        std::memcpy(call.m + at, m_end, count);
        std::memcpy(call.v + at, v_end, count);
      }
    }
  });
}

template <Dtype P>
void update(const AdamW8bitArgs& call) {
  switch (call.g_dtype) {
    case Dtype::kFloat32:
      return update<P, Dtype::kFloat32>(call);
    case Dtype::kFloat16:
      return update<P, Dtype::kFloat16>(call);
    case Dtype::kBfloat16:
      return update<P, Dtype::kBfloat16>(call);
    default:  // the binding lets none in
      return;
  }
}

}  // namespace

void adamw8bit(const AdamW8bitArgs& call) {
  switch (call.p_dtype) {
    case Dtype::kFloat32:
      return update<Dtype::kFloat32>(call);
    case Dtype::kFloat16:
      return update<Dtype::kFloat16>(call);
    case Dtype::kBfloat16:
      return update<Dtype::kBfloat16>(call);
    default:  // the binding lets none in
      return;
  }
}

}  // namespace bitfuse::BITFUSE_ISA
