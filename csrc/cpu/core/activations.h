// The activations that ops apply inside, and their derivatives: float32, within two units in the last place
// or so of the exact value, tails included. NaN comes out as NaN, infinities and huge values as the limits.
#pragma once

#include "common/types.h"
#include "cpu/isa/contract.h"

namespace bitfuse::BITFUSE_ISA {

// e^x for x <= 88, to 0 below: 2^n e^r with |r| <= ln 2 / 2, e^r by a polynomial that errs by 3e-9 (a
// Chebyshev fit).
BITFUSE_INLINE Vf exponential(Vf x) {
  const Vf magic = set1(12582912.0f);  // 1.5 * 2^23, whose last place is 1
  x = maximum(set1(-150), x);
  const Vf n = sub(fma(x, set1(1.44269504f), magic), magic);
  Vf r = fma(n, set1(-0.693145752f), x);  // ln 2 in two parts, the first of few bits: n times it is exact
  r = fma(n, set1(-1.42860677e-6f), r);
  Vf p = set1(0.0013950996799394488f);
  p = fma(p, r, set1(0.00837682094424963f));
  p = fma(p, r, set1(0.041666179895401f));
  p = fma(p, r, set1(0.16666394472122192f));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1));
  p = fma(p, r, set1(1));
  return scale_by_power(p, n);
}

// 1 / (1 + e^-v), and 1 less it: neither cancels.
struct Sigmoid {
  Vf value, rest;
};
BITFUSE_INLINE Sigmoid sigmoid(Vf v) {
  const Vf e = exponential(sub(zero(), absolute(v)));
  const Vf small = div(e, add(set1(1), e)), large = sub(set1(1), small);
  return {by_sign(v, large, small), by_sign(v, small, large)};
}

// The normal distribution: Phi(z) and its density. erfc(t) = e^(-t t) P(u) / (1 + 2 t) with u = (t - 3) / (t
// + 3) (the form of Shepherd and Laframboise, 1981), P a Chebyshev fit for t to 11, past which e^(-t t) is 0.
struct Normal {
  Vf phi, density;
};
BITFUSE_INLINE Normal normal(Vf z) {
  const Vf far = minimum(set1(15.5f), absolute(z)), square = mul(far, far);
  Vf e = exponential(mul(square, set1(-0.5f)));
  e = fma(e, mul(fma(sub(zero(), far), far, square), set1(0.5f)), e);  // what rounding took from the square
  const Vf t = mul(far, set1(0.707106781f));
  const Vf u = div(sub(t, set1(3)), add(t, set1(3)));
  Vf p = set1(-0.00026397418696433306f);
  p = fma(p, u, set1(-0.0007652317290194333f));
  p = fma(p, u, set1(0.0020121680572628975f));
  p = fma(p, u, set1(0.002565470291301608f));
  p = fma(p, u, set1(-0.0238034725189209f));
  p = fma(p, u, set1(0.06829450279474258f));
  p = fma(p, u, set1(-0.11927004903554916f));
  p = fma(p, u, set1(0.1296466886997223f));
  p = fma(p, u, set1(-0.04756244271993637f));
  p = fma(p, u, set1(-0.13562114536762238f));
  p = fma(p, u, set1(1.2530080080032349f));
  const Vf tail = div(mul(mul(e, set1(0.5f)), p), fma(set1(2), t, set1(1)));  // erfc(t) / 2
  return {by_sign(z, sub(set1(1), tail), tail), mul(e, set1(0.398942280f))};
}

// act(z), and its derivative where that is asked for.
struct Activated {
  Vf value, derivative;
};
template <Activation A>
BITFUSE_INLINE Activated activated(Vf z) {
  constexpr double kScale = 0.79788456080286536, kCube = 0.044715;  // of gelu's tanh form
  if constexpr (A == Activation::kRelu) {
    const Vf value = maximum(zero(), z);
    return {value, by_sign(sub(zero(), value), zero(), set1(1))};
  } else if constexpr (A == Activation::kSilu) {
    const Sigmoid s = sigmoid(z);
    const Vf value = mul(z, s.value);
    return {value, fma(mul(minimum(set1(200), maximum(set1(-200), z)), s.value), s.rest, s.value)};
  } else if constexpr (A == Activation::kGelu) {
    const Normal n = normal(z);
    return {mul(z, n.phi), fma(minimum(set1(50), maximum(set1(-50), z)), n.density, n.phi)};
  } else {
    // 1/2 (1 + tanh u) = sigmoid(2 u)
    const Vf near = minimum(set1(50), maximum(set1(-50), z)), square = mul(near, near);
    const Vf v = mul(near, fma(square, set1(float(2 * kScale * kCube)), set1(float(2 * kScale))));
    const Sigmoid s = sigmoid(v);
    const Vf slope = mul(near, fma(square, set1(float(6 * kScale * kCube)), set1(float(2 * kScale))));
    return {mul(z, s.value), fma(mul(s.value, s.rest), slope, s.value)};
  }
}

template <class F>
BITFUSE_INLINE void with_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::kSilu:
      return f([](Vf z) __attribute__((always_inline)) { return activated<Activation::kSilu>(z); });
    case Activation::kGelu:
      return f([](Vf z) __attribute__((always_inline)) { return activated<Activation::kGelu>(z); });
    case Activation::kGeluTanh:
      return f([](Vf z) __attribute__((always_inline)) { return activated<Activation::kGeluTanh>(z); });
    case Activation::kRelu:
      return f([](Vf z) __attribute__((always_inline)) { return activated<Activation::kRelu>(z); });
  }
}

}  // namespace bitfuse::BITFUSE_ISA
