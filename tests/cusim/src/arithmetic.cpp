// Integer, bit and floating-point arithmetic.
#include <algorithm>
#include <cfenv>

#include "instruction.hpp"

namespace cusim {
namespace {

enum class Bin { Add, Sub, Mul, MulHi, Div, Rem, Min, Max, And, Or, Xor, MinNan, MaxNan, CopySign };

template <class T, Bin op>
T apply_integer(T a, T b) {
  using U = std::make_unsigned_t<T>;
  if constexpr (op == Bin::Add) return T(U(a) + U(b));
  if constexpr (op == Bin::Sub) return T(U(a) - U(b));
  if constexpr (op == Bin::Mul) return T(uint64_t(U(a)) * uint64_t(U(b)));
  if constexpr (op == Bin::MulHi) {
    // no wider than it must be: of a product of 16 x 16 bits in 64, g++ 12 keeps the upper half of the
    // unsigned one when it vectorises
    using Signed =
        std::conditional_t<sizeof(T) == 8, __int128, std::conditional_t<sizeof(T) == 4, int64_t, int>>;
    using Unsigned = std::conditional_t<sizeof(T) == 8, unsigned __int128,
                                        std::conditional_t<sizeof(T) == 4, uint64_t, unsigned>>;
    using Wide = std::conditional_t<std::is_signed_v<T>, Signed, Unsigned>;
    return T((Wide(a) * Wide(b)) >> (8 * sizeof(T)));
  }
  if constexpr (op == Bin::Div) {
    if (b == 0) return T(-1);
    if (std::is_signed_v<T> && b == T(-1)) return T(U(0) - U(a));
    return a / b;
  }
  if constexpr (op == Bin::Rem) {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == T(-1)) return 0;
    return a % b;
  }
  if constexpr (op == Bin::Min || op == Bin::MinNan) return std::min(a, b);
  if constexpr (op == Bin::Max || op == Bin::MaxNan) return std::max(a, b);
  if constexpr (op == Bin::And) return a & b;
  if constexpr (op == Bin::Or) return a | b;
  if constexpr (op == Bin::Xor) return a ^ b;
  return 0;
}
// Of two 16-bit floats too: float has more than twice their bits, so rounding twice rounds as once.
template <class F, Bin op>
F apply_float(F x, F y) {
  if constexpr (op == Bin::Add) return x + y;
  if constexpr (op == Bin::Sub) return x - y;
  if constexpr (op == Bin::Mul) return x * y;
  if constexpr (op == Bin::Div) return x / y;
  if constexpr (op == Bin::Min)
    return x != x ? y : y != y ? x : x == 0 && y == 0 ? (std::signbit(x) ? x : y) : std::min(x, y);
  if constexpr (op == Bin::Max)
    return x != x ? y : y != y ? x : x == 0 && y == 0 ? (std::signbit(x) ? y : x) : std::max(x, y);
  if constexpr (op == Bin::MinNan)
    return x != x || y != y ? NAN : x == 0 && y == 0 ? (std::signbit(x) ? x : y) : std::min(x, y);
  if constexpr (op == Bin::MaxNan)
    return x != x || y != y ? NAN : x == 0 && y == 0 ? (std::signbit(x) ? y : x) : std::max(x, y);
  if constexpr (op == Bin::CopySign) return std::copysign(y, x);
  return 0;
}
template <class T, Bin op>
T apply(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    return apply_integer<T, op>(a, b);
  } else {
    T o;
    down(apply_float<decltype(up(a)), op>(up(a), up(b)), o);
    return o;
  }
}
template <class F>
F saturate(F v) {
  return v != v ? F(0) : std::min(F(1), std::max(F(0), v));
}

template <class T, Bin op>
void bin(Warp& w, const Instr& i, uint32_t m) {
  binary<T>(w, i, m, [](T a, T b) {
    if constexpr (is_pair<T>)
      return both<T>([](auto x, auto y) { return apply<decltype(x), op>(x, y); }, a, b);
    else
      return apply<T, op>(a, b);
  });
}
template <class T, Bin op>
T saturated(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    int64_t z = op == Bin::Add ? int64_t(a) + int64_t(b) : int64_t(a) - int64_t(b);
    return T(std::clamp<int64_t>(z, std::numeric_limits<T>::min(), std::numeric_limits<T>::max()));
  } else {
    T o;
    down(saturate(up(apply<T, op>(a, b))), o);
    return o;
  }
}
template <class T, Bin op>
void bin_sat(Warp& w, const Instr& i, uint32_t m) {
  binary<T>(w, i, m, [](T a, T b) {
    if constexpr (is_pair<T>)
      return both<T>([](auto x, auto y) { return saturated<decltype(x), op>(x, y); }, a, b);
    else
      return saturated<T, op>(a, b);
  });
}

// Rounding modes other than to nearest: the host's own, for the length of one operation.
int host_rounding(const Opcode& op) {
  return op.has("rz") ? FE_TOWARDZERO : op.has("rm") ? FE_DOWNWARD : op.has("rp") ? FE_UPWARD : FE_TONEAREST;
}
template <class F, class Op>
void directed(Warp& w, const Instr& i, uint32_t m, Op f) {
  Lanes d = dst(w, i.ops[0]);
  std::fesetround(int(i.aux2));
  for (int l : lanes_of(m)) {
    volatile F x[3] = {};  // so that no operation moves out of the rounding mode
    for (size_t k = 1; k < i.ops.size() && k <= 3; ++k) x[k - 1] = rd<F>(w.row(i.ops[k]), l);
    volatile F r = f(x[0], x[1], x[2]);
    wr<F>(d, l, i.aux & 1 ? saturate(F(r)) : F(r));
  }
  std::fesetround(FE_TONEAREST);
}
template <class F, Bin op>
void bin_directed(Warp& w, const Instr& i, uint32_t m) {
  directed<F>(w, i, m, [](F a, F b, F) { return apply_float<F, op>(a, b); });
}
template <class F>
void fma_directed(Warp& w, const Instr& i, uint32_t m) {
  directed<F>(w, i, m, [](F a, F b, F c) { return std::fma(a, b, c); });
}
template <class F>
void sqrt_directed(Warp& w, const Instr& i, uint32_t m) {
  directed<F>(w, i, m, [](F a, F, F) { return std::sqrt(a); });
}
template <class F>
void rcp_directed(Warp& w, const Instr& i, uint32_t m) {
  directed<F>(w, i, m, [](F a, F, F) { return F(1) / a; });
}

// two floats in a 64-bit register
template <Bin op>
void bin_f32x2(Warp& w, const Instr& i, uint32_t m) {
  binary<uint64_t>(w, i, m, [](uint64_t a, uint64_t b) {
    auto half = [&](int s) {
      return uint64_t(as_u32(apply_float<float, op>(as_f32(a >> s), as_f32(b >> s)))) << s;
    };
    return half(0) | half(32);
  });
}
void fma_f32x2(Warp& w, const Instr& i, uint32_t m) {
  ternary<uint64_t>(w, i, m, [](uint64_t a, uint64_t b, uint64_t c) {
    auto half = [&](int s) {
      return uint64_t(as_u32(std::fma(as_f32(a >> s), as_f32(b >> s), as_f32(c >> s)))) << s;
    };
    return half(0) | half(32);
  });
}
template <Bin op, class H>
void bin_16x2(Warp& w, const Instr& i, uint32_t m) {
  binary<uint32_t>(w, i, m, [](uint32_t a, uint32_t b) {
    auto half = [&](int s) { return uint32_t(uint16_t(apply<H, op>(H(a >> s), H(b >> s)))) << s; };
    return half(0) | half(16);
  });
}

template <Bin op>
Execute bin_for(const Opcode& op_) {
  std::string t = op_.type();
  if constexpr (op == Bin::Add || op == Bin::Sub || op == Bin::Mul) {
    if (t == "f32x2") return bin_f32x2<op>;
    if (op_.has("sat")) {
      if (t == "s32") return bin_sat<int32_t, op>;
      if (t == "f32") return bin_sat<float, op>;
      if (t == "f16") return bin_sat<f16, op>;
      if (Execute e = for_pair(t, []<class T>() -> Execute { return bin_sat<T, op>; })) return e;
      unsupported(op_);
    }
  }
  if constexpr (op != Bin::CopySign)
    if (Execute e = for_integer(t, []<class T>() -> Execute { return bin<T, op>; })) return e;
  if constexpr (op < Bin::And || op > Bin::Xor) {
    if (Execute e = for_float(t, []<class T>() -> Execute { return bin<T, op>; })) return e;
    if (Execute e = for_pair(t, []<class T>() -> Execute { return bin<T, op>; })) return e;
  }
  unsupported(op_);
}
template <Bin op>
Execute bin_16x2_for(const Opcode& o) {
  if (o.type() == "s16x2") return bin_16x2<op, int16_t>;
  return o.type() == "u16x2" ? bin_16x2<op, uint16_t> : nullptr;
}
template <Bin op>
void decode_bin(Instr& i, const Opcode& o) {
  if ((i.fn = bin_16x2_for<op>(o))) return;
  if constexpr (op == Bin::Add || op == Bin::Sub || op == Bin::Mul || op == Bin::Div)
    if (int mode = host_rounding(o); mode != FE_TONEAREST) {
      i.aux = o.has("sat");
      i.aux2 = mode;
      i.fn = o.type() == "f32"   ? bin_directed<float, op>
             : o.type() == "f64" ? bin_directed<double, op>
                                 : nullptr;
      required(i.fn, o);
      return;
    }
  i.fn = bin_for<op>(o);
}
template <Bin op>
void bin_relu(Warp& w, const Instr& i, uint32_t m) {  // a result below 0 is 0
  binary<int32_t>(w, i, m, [](int32_t a, int32_t b) { return std::max(apply<int32_t, op>(a, b), 0); });
}
template <Bin plain, Bin nan>
void decode_extreme(Instr& i, const Opcode& o) {
  if (o.has("xorsign") || o.has("abs") || (o.has("relu") && o.type() != "s32")) unsupported(o);
  if (o.has("relu"))
    i.fn = bin_relu<plain>;
  else if (o.has("NaN"))
    decode_bin<nan>(i, o);
  else
    decode_bin<plain>(i, o);
}

template <Bin op>
void pred_logic(Warp& w, const Instr& i, uint32_t m) {  // operands may be negated
  Lanes d = dst(w, i.ops[0]);
  each_lane(m, [&](int l) {
    bool x = truth(w, i.ops[1], l), y = truth(w, i.ops[2], l);
    d[l] = op == Bin::And ? x & y : op == Bin::Or ? x | y : x ^ y;
  });
}
template <Bin op>
void decode_logic(Instr& i, const Opcode& o) {
  i.fn = o.type() == "pred" ? pred_logic<op> : bin_for<op>(o);
}

// ---- fma and mad ----
template <class T>
void fma_plain(Warp& w, const Instr& i, uint32_t m) {
  ternary<T>(w, i, m, [](T a, T b, T c) { return std::fma(a, b, c); });
}
template <class T>
void fma_sat(Warp& w, const Instr& i, uint32_t m) {
  ternary<T>(w, i, m, [](T a, T b, T c) { return saturate(std::fma(a, b, c)); });
}
template <class H>
H fma_half(H a, H b, H c, bool sat, bool relu) {
  double v = double(up(a)) * up(b) + up(c);
  if (sat) v = saturate(v);
  if (relu) v = v > 0 || v != v ? v : 0;
  H o;
  down(v, o);
  return o;
}
template <class T>
void fma_16(Warp& w, const Instr& i, uint32_t m) {
  bool sat = i.aux & 1, relu = i.aux & 2;
  auto one = [=](auto a, auto b, auto c) { return fma_half(a, b, c, sat, relu); };
  ternary<T>(w, i, m, [=](T a, T b, T c) {
    if constexpr (is_pair<T>)
      return both<T>(one, a, b, c);
    else
      return one(a, b, c);
  });
}
void decode_fma(Instr& i, const Opcode& o) {
  std::string t = o.type();
  i.aux = o.has("sat") | o.has("relu") << 1;
  if (int mode = host_rounding(o); mode != FE_TONEAREST) {
    i.aux2 = mode;
    i.fn = t == "f32" ? fma_directed<float> : t == "f64" ? fma_directed<double> : nullptr;
  } else if (t == "f32") {
    i.fn = o.has("sat") ? fma_sat<float> : fma_plain<float>;
  } else if (t == "f64") {
    i.fn = fma_plain<double>;
  } else if (t == "f32x2") {
    i.fn = fma_f32x2;
  } else if (t == "f16") {
    i.fn = fma_16<f16>;
  } else if (t == "bf16") {
    i.fn = fma_16<bf16>;
  } else {
    i.fn = for_pair(t, []<class T>() -> Execute { return fma_16<T>; });
  }
  required(i.fn, o);
}
template <class T>
void mad_lo(Warp& w, const Instr& i, uint32_t m) {
  ternary<T>(w, i, m, [](T a, T b, T c) {
    using U = std::make_unsigned_t<T>;
    return T(uint64_t(U(a)) * uint64_t(U(b)) + uint64_t(U(c)));
  });
}
template <class T>
void mad_hi(Warp& w, const Instr& i, uint32_t m) {
  ternary<T>(w, i, m,
             [](T a, T b, T c) { return apply_integer<T, Bin::Add>(apply_integer<T, Bin::MulHi>(a, b), c); });
}
template <class T, class Wide, bool add>
void mul_wide(Warp& w, const Instr& i, uint32_t m) {
  using U = std::make_unsigned_t<Wide>;
  Lanes d = dst(w, i.ops[0]);
  const uint64_t *a = w.row(i.ops[1]), *b = w.row(i.ops[2]), *c = add ? w.row(i.ops[3]) : nullptr;
  each_lane(m, [&](int l) {
    U r = U(Wide(rd<T>(a, l))) * U(Wide(rd<T>(b, l)));
    if constexpr (add) r += U(rd<Wide>(c, l));
    wr<Wide>(d, l, Wide(r));
  });
}
template <bool add>
Execute wide_for(const Opcode& o) {
  std::string t = o.type();
  if (t == "s16") return mul_wide<int16_t, int32_t, add>;
  if (t == "u16") return mul_wide<uint16_t, uint32_t, add>;
  if (t == "s32") return mul_wide<int32_t, int64_t, add>;
  if (t == "u32") return mul_wide<uint32_t, uint64_t, add>;
  unsupported(o);
}
void decode_mul(Instr& i, const Opcode& o) {
  if (o.has("wide"))
    i.fn = wide_for<false>(o);
  else if (o.has("hi"))
    i.fn = required(for_integer(o.type(), []<class T>() -> Execute { return bin<T, Bin::MulHi>; }), o);
  else
    decode_bin<Bin::Mul>(i, o);
}

// add.cc, addc, sub.cc, subc, mad.lo.cc, madc.lo, madc.hi. aux: 1 carry in, 2 carry out
enum class Carry : uint8_t { Add, Sub, MadLo, MadHi };
template <class T, Carry op>
void carry_fn(Warp& w, const Instr& i, uint32_t m) {
  using Wide = std::conditional_t<sizeof(T) == 8, unsigned __int128, uint64_t>;
  Lanes d = dst(w, i.ops[0]);
  const uint64_t *a = w.row(i.ops[1]), *b = w.row(i.ops[2]);
  for (int l : lanes_of(m)) {
    Wide in = i.aux & 1 ? w.carry >> l & 1 : 0, x = rd<T>(a, l), y = rd<T>(b, l), r;
    if constexpr (op == Carry::MadLo || op == Carry::MadHi) {
      Wide p = x * y;
      r = (op == Carry::MadLo ? T(p) : T(p >> (8 * sizeof(T)))) + Wide(rd<T>(w.row(i.ops[3]), l)) + in;
    } else {
      r = op == Carry::Sub ? x - y - in : x + y + in;
    }
    if (i.aux & 2) w.carry = (w.carry & ~(1u << l)) | uint32_t(r >> (8 * sizeof(T)) & 1) << l;
    wr<T>(d, l, T(r));
  }
}
template <Carry op>
void decode_carry_op(Instr& i, const Opcode& o) {
  std::string t = o.type();
  i.fn = t == "u64" || t == "s64" ? carry_fn<uint64_t, op> : carry_fn<uint32_t, op>;
  i.aux = (o.base.back() == 'c') | o.has("cc") << 1;
}
void decode_carry(Instr& i, const Opcode& o) {
  if (o.base[0] == 'a') return decode_carry_op<Carry::Add>(i, o);
  if (o.base[0] == 's') return decode_carry_op<Carry::Sub>(i, o);
  o.has("hi") ? decode_carry_op<Carry::MadHi>(i, o) : decode_carry_op<Carry::MadLo>(i, o);
}
void decode_add(Instr& i, const Opcode& o) { o.has("cc") ? decode_carry(i, o) : decode_bin<Bin::Add>(i, o); }
void decode_sub(Instr& i, const Opcode& o) { o.has("cc") ? decode_carry(i, o) : decode_bin<Bin::Sub>(i, o); }
void decode_mad(Instr& i, const Opcode& o) {
  std::string t = o.type();
  if (o.has("cc")) return decode_carry(i, o);
  if (o.has("sat")) unsupported(o);
  if (o.has("wide"))
    i.fn = wide_for<true>(o);
  else if (t[0] == 'f')
    decode_fma(i, o);
  else if (o.has("hi"))
    i.fn = required(for_integer(t, []<class T>() -> Execute { return mad_hi<T>; }), o);
  else
    i.fn = required(for_integer(t, []<class T>() -> Execute { return mad_lo<T>; }), o);
}

// ---- signs and bits ----
template <class T, bool neg>
void sign_integer(Warp& w, const Instr& i, uint32_t m) {
  unary<T>(w, i, m, [](T a) { return neg || a < 0 ? T(0 - std::make_unsigned_t<T>(a)) : a; });
}
template <uint64_t bits, bool flip>
void sign_bits(Warp& w, const Instr& i, uint32_t m) {
  unary<uint64_t>(w, i, m, [](uint64_t a) { return flip ? a ^ bits : a & ~bits; });
}
template <bool neg>
void decode_sign(Instr& i, const Opcode& o) {
  std::string t = o.type();
  i.fn = t == "s16"                      ? sign_integer<int16_t, neg>
         : t == "s32"                    ? sign_integer<int32_t, neg>
         : t == "s64"                    ? sign_integer<int64_t, neg>
         : t == "f32"                    ? sign_bits<0x80000000ull, neg>
         : t == "f64"                    ? sign_bits<1ull << 63, neg>
         : t == "f16" || t == "bf16"     ? sign_bits<0x8000ull, neg>
         : t == "f16x2" || t == "bf16x2" ? sign_bits<0x80008000ull, neg>
                                         : nullptr;
  required(i.fn, o);
}
template <class T>
void not_fn(Warp& w, const Instr& i, uint32_t m) {
  unary<T>(w, i, m, [](T a) { return T(~a); });
}
void not_pred(Warp& w, const Instr& i, uint32_t m) {
  Lanes d = dst(w, i.ops[0]);
  each_lane(m, [&](int l) { d[l] = !truth(w, i.ops[1], l); });
}
void decode_not(Instr& i, const Opcode& o) {
  i.fn = o.type() == "pred"
             ? not_pred
             : required(for_integer(o.type(), []<class T>() -> Execute { return not_fn<T>; }), o);
}
template <class T, bool left>
void shift(Warp& w, const Instr& i, uint32_t m) {
  constexpr uint32_t bits = 8 * sizeof(T);
  Lanes d = dst(w, i.ops[0]);
  const uint64_t *a = w.row(i.ops[1]), *b = w.row(i.ops[2]);
  each_lane(m, [&](int l) {
    T v = rd<T>(a, l);
    uint32_t s = rd<uint32_t>(b, l);
    if constexpr (left)
      wr<T>(d, l, s >= bits ? T(0) : T(v << s));
    else
      wr<T>(d, l, s < bits ? T(v >> s) : std::is_signed_v<T> && v < 0 ? T(-1) : T(0));
  });
}
template <bool left>
void decode_shift(Instr& i, const Opcode& o) {
  i.fn = required(for_integer(o.type(), []<class T>() -> Execute { return shift<T, left>; }), o);
}
template <bool left, bool wrap>
void funnel_shift(Warp& w, const Instr& i, uint32_t m) {
  ternary<uint32_t>(w, i, m, [](uint32_t a, uint32_t b, uint32_t s) {
    uint64_t v = uint64_t(b) << 32 | a;
    s = wrap ? s & 31 : std::min(s, 32u);
    return left ? uint32_t((v << s) >> 32) : uint32_t(v >> s);
  });
}
void decode_shf(Instr& i, const Opcode& o) {
  bool wrap = o.has("wrap");
  i.fn = o.has("l") ? (wrap ? funnel_shift<true, true> : funnel_shift<true, false>)
                    : (wrap ? funnel_shift<false, true> : funnel_shift<false, false>);
}
void lop3(Warp& w, const Instr& i, uint32_t m) {
  uint32_t lut = uint32_t(w.row(i.ops[4])[0]), on[8];
  for (int k = 0; k < 8; ++k) on[k] = lut >> k & 1 ? ~0u : 0u;
  ternary<uint32_t>(w, i, m, [&](uint32_t x, uint32_t y, uint32_t z) {
    return (on[0] & ~x & ~y & ~z) | (on[1] & ~x & ~y & z) | (on[2] & ~x & y & ~z) | (on[3] & ~x & y & z) |
           (on[4] & x & ~y & ~z) | (on[5] & x & ~y & z) | (on[6] & x & y & ~z) | (on[7] & x & y & z);
  });
}
const char* const kPermute[] = {"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"};
uint32_t permute(uint64_t v, uint32_t sel, int mode) {
  uint32_t r = 0, s = sel & 3;
  for (uint32_t k = 0; k < 4; ++k) {
    uint32_t at = 0;
    bool sign = false;
    switch (mode) {
      case -1:
        at = sel >> (4 * k) & 7, sign = sel >> (4 * k) & 8;
        break;
      case 0:
        at = s + k;
        break;
      case 1:
        at = (8 + s - k) & 7;
        break;
      case 2:
        at = s;
        break;
      case 3:
        at = std::max(k, s);
        break;
      case 4:
        at = std::min(k, s);
        break;
      default:
        at = (s & 1) * 2 + (k & 1);
    }
    uint8_t byte = uint8_t(v >> (8 * at));
    if (sign) byte = byte & 0x80 ? 0xff : 0;
    r |= uint32_t(byte) << (8 * k);
  }
  return r;
}
void prmt(Warp& w, const Instr& i, uint32_t m) {
  int mode = int(i.aux);
  ternary<uint32_t>(w, i, m, [=](uint32_t a, uint32_t b, uint32_t sel) {
    return permute(uint64_t(b) << 32 | a, sel, mode);
  });
}
void decode_prmt(Instr& i, const Opcode& o) {
  i.fn = prmt;
  i.aux = which(o, kPermute);
}
template <class T>
void bfe(Warp& w, const Instr& i, uint32_t m) {
  using U = std::make_unsigned_t<T>;
  constexpr uint32_t bits = 8 * sizeof(T);
  Lanes d = dst(w, i.ops[0]);
  const uint64_t *a = w.row(i.ops[1]), *b = w.row(i.ops[2]), *c = w.row(i.ops[3]);
  each_lane(m, [&](int l) {
    uint32_t pos = b[l] & 255, len = c[l] & 255;
    U v = U(rd<T>(a, l));
    // past the end of the value its sign bit is repeated
    bool sign = std::is_signed_v<T> && len && (v >> std::min(pos + len - 1, bits - 1) & 1);
    U r = pos < bits ? U(v >> pos) : U(0);
    uint32_t have = pos < bits ? std::min(len, bits - pos) : 0;
    if (have < bits) {
      r &= (U(1) << have) - 1;
      if (sign) r |= ~((U(1) << have) - 1);
    }
    wr<T>(d, l, T(r));
  });
}
void decode_bfe(Instr& i, const Opcode& o) {
  i.fn = required(
      for_integer(o.type(), []<class T>() -> Execute { return sizeof(T) > 2 ? bfe<T> : nullptr; }), o);
}
template <class T>
void bfi(Warp& w, const Instr& i, uint32_t m) {
  constexpr uint32_t bits = 8 * sizeof(T);
  Lanes d = dst(w, i.ops[0]);
  const uint64_t *a = w.row(i.ops[1]), *b = w.row(i.ops[2]), *c = w.row(i.ops[3]), *e = w.row(i.ops[4]);
  each_lane(m, [&](int l) {
    uint32_t pos = c[l] & 255, len = e[l] & 255;
    T into = rd<T>(b, l), keep = len >= bits ? T(-1) : T((T(1) << len) - 1);
    wr<T>(d, l, pos < bits ? T((into & ~T(keep << pos)) | T((rd<T>(a, l) & keep) << pos)) : into);
  });
}
template <class T>
void popc(Warp& w, const Instr& i, uint32_t m) {
  unary<uint64_t>(w, i, m, [](uint64_t v) { return uint64_t(std::popcount(T(v))); });
}
template <class T>
void clz(Warp& w, const Instr& i, uint32_t m) {
  unary<uint64_t>(w, i, m, [](uint64_t v) { return uint64_t(std::countl_zero(T(v))); });
}
template <class T>
void brev(Warp& w, const Instr& i, uint32_t m) {
  unary<T>(w, i, m, [](T v) {
    T r = 0;
    for (size_t k = 0; k < 8 * sizeof(T); ++k) r |= T(v >> k & 1) << (8 * sizeof(T) - 1 - k);
    return r;
  });
}
template <class T>
void bfind(Warp& w, const Instr& i, uint32_t m) {
  bool amount = i.aux;
  unary<uint64_t>(w, i, m, [=](uint64_t x) {
    T v = T(x);
    if (std::is_signed_v<T> && v < 0) v = T(~v);
    int zeros = std::countl_zero(std::make_unsigned_t<T>(v)), bits = 8 * sizeof(T);
    return zeros == bits ? 0xffffffffull : uint64_t(amount ? zeros : bits - 1 - zeros);
  });
}
void decode_bfind(Instr& i, const Opcode& o) {
  i.fn = required(for_integer(o.type(), []<class T>() -> Execute { return bfind<T>; }), o);
  i.aux = o.has("shiftamt");
}
template <class T>
void sad(Warp& w, const Instr& i, uint32_t m) {
  ternary<T>(w, i, m, [](T a, T b, T c) {
    using U = std::make_unsigned_t<T>;
    return T(U(c) + (a > b ? U(a) - U(b) : U(b) - U(a)));
  });
}
template <class TA, class TB>
void dp4a(Warp& w, const Instr& i, uint32_t m) {
  ternary<uint32_t>(w, i, m, [](uint32_t a, uint32_t b, uint32_t c) {
    for (int s = 0; s < 32; s += 8) c += uint32_t(int32_t(TA(a >> s)) * int32_t(TB(b >> s)));
    return c;
  });
}
void decode_dp4a(Instr& i, const Opcode& o) {
  bool sa = o.mods[0] == "s32", sb = o.mods[1] == "s32";
  i.fn = sa ? (sb ? dp4a<int8_t, int8_t> : dp4a<int8_t, uint8_t>)
            : (sb ? dp4a<uint8_t, int8_t> : dp4a<uint8_t, uint8_t>);
}

// ---- float functions ----
float ex2(float x) { return std::exp2(x); }
float lg2(float x) { return std::log2(x); }
float sine(float x) { return std::sin(x); }
float cosine(float x) { return std::cos(x); }
float tanh_(float x) { return std::tanh(x); }
template <class T, float (*f)(float)>
void function(Warp& w, const Instr& i, uint32_t m) {
  auto one = [](auto x) {
    decltype(x) o;
    down(f(up(x)), o);
    return o;
  };
  unary<T>(w, i, m, [=](T x) {
    if constexpr (is_pair<T>)
      return both<T>(one, x);
    else
      return one(x);
  });
}
template <float (*f)(float)>
void decode_function(Instr& i, const Opcode& o) {
  std::string t = o.type();
  i.fn = t == "f32"    ? function<float, f>
         : t == "f16"  ? function<f16, f>
         : t == "bf16" ? function<bf16, f>
                       : required(for_pair(t, []<class T>() -> Execute { return function<T, f>; }), o);
}
template <class F>
void rcp(Warp& w, const Instr& i, uint32_t m) {
  unary<F>(w, i, m, [](F x) { return F(1) / x; });
}
template <class F>
void square_root(Warp& w, const Instr& i, uint32_t m) {
  unary<F>(w, i, m, [](F x) { return std::sqrt(x); });
}
template <class F>
void rsqrt(Warp& w, const Instr& i, uint32_t m) {
  unary<F>(w, i, m, [](F x) { return F(1. / std::sqrt(double(x))); });
}
void decode_root(Instr& i, const Opcode& o) {
  bool wide = o.type() == "f64", root = o.base == "sqrt";
  i.aux2 = host_rounding(o);
  if (i.aux2 != FE_TONEAREST)
    i.fn = root ? (wide ? sqrt_directed<double> : sqrt_directed<float>)
                : (wide ? rcp_directed<double> : rcp_directed<float>);
  else
    i.fn = root ? (wide ? square_root<double> : square_root<float>) : (wide ? rcp<double> : rcp<float>);
}
const char* const kTest[] = {"finite", "infinite", "number", "notanumber", "normal", "subnormal"};
template <class T>
void testp(Warp& w, const Instr& i, uint32_t m) {
  Lanes d = dst(w, i.ops[0]);
  const uint64_t* a = w.row(i.ops[1]);
  each_lane(m, [&](int l) {
    T x = rd<T>(a, l);
    switch (i.aux) {
      case 0:
        d[l] = std::isfinite(x);
        break;
      case 1:
        d[l] = std::isinf(x);
        break;
      case 2:
        d[l] = x == x;
        break;
      case 3:
        d[l] = x != x;
        break;
      case 4:
        d[l] = std::isnormal(x);
        break;
      default:
        d[l] = x != 0 && std::isfinite(x) && !std::isnormal(x);
    }
  });
}

}  // namespace

void add_arithmetic(DecoderTable& t) {
  t["add"] = decode_add;
  t["sub"] = decode_sub;
  t["mul"] = decode_mul;
  t["mad"] = decode_mad;
  t["fma"] = decode_fma;
  t["addc"] = t["subc"] = t["madc"] = decode_carry;
  t["div"] = decode_bin<Bin::Div>;
  t["rem"] = decode_bin<Bin::Rem>;
  t["min"] = decode_extreme<Bin::Min, Bin::MinNan>;
  t["max"] = decode_extreme<Bin::Max, Bin::MaxNan>;
  t["copysign"] = decode_bin<Bin::CopySign>;
  t["and"] = decode_logic<Bin::And>;
  t["or"] = decode_logic<Bin::Or>;
  t["xor"] = decode_logic<Bin::Xor>;
  t["not"] = decode_not;
  t["neg"] = decode_sign<true>;
  t["abs"] = decode_sign<false>;
  t["shl"] = decode_shift<true>;
  t["shr"] = decode_shift<false>;
  t["shf"] = decode_shf;
  t["lop3"] = [](Instr& i, const Opcode& o) {
    if (o.has("or") || o.has("and")) unsupported(o);
    i.fn = lop3;
  };
  t["prmt"] = decode_prmt;
  t["bfe"] = decode_bfe;
  t["bfi"] = [](Instr& i, const Opcode& o) { i.fn = o.type() == "b64" ? bfi<uint64_t> : bfi<uint32_t>; };
  t["popc"] = [](Instr& i, const Opcode& o) { i.fn = o.type() == "b64" ? popc<uint64_t> : popc<uint32_t>; };
  t["clz"] = [](Instr& i, const Opcode& o) { i.fn = o.type() == "b64" ? clz<uint64_t> : clz<uint32_t>; };
  t["brev"] = [](Instr& i, const Opcode& o) { i.fn = o.type() == "b64" ? brev<uint64_t> : brev<uint32_t>; };
  t["bfind"] = decode_bfind;
  t["sad"] = [](Instr& i, const Opcode& o) {
    i.fn = required(for_integer(o.type(), []<class T>() -> Execute { return sad<T>; }), o);
  };
  t["dp4a"] = decode_dp4a;
  t["ex2"] = decode_function<ex2>;
  t["tanh"] = decode_function<tanh_>;
  t["lg2"] = decode_function<lg2>;
  t["sin"] = decode_function<sine>;
  t["cos"] = decode_function<cosine>;
  t["rcp"] = t["sqrt"] = decode_root;
  t["rsqrt"] = [](Instr& i, const Opcode& o) { i.fn = o.type() == "f64" ? rsqrt<double> : rsqrt<float>; };
  t["testp"] = [](Instr& i, const Opcode& o) {
    i.fn = o.type() == "f64" ? testp<double> : testp<float>;
    i.aux = which(o, kTest);
  };
}

}  // namespace cusim
