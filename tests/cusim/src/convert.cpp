// cvt: between integers and floats of every width, and the packed small floats.
#include <algorithm>
#include <cfenv>

#include "instruction.hpp"

namespace cusim {
namespace {

struct tf32 {
  uint32_t b;
};
float up(tf32 x) { return as_f32(x.b); }
using cusim::up;

enum Round { rn, rz, rm, rp, rna };
const char* const kRound[] = {"rn", "rz", "rm", "rp", "rna"};
const char* const kRoundInteger[] = {"rni", "rzi", "rmi", "rpi"};

double to_integral(double v, int how) {
  switch (how) {
    case rz:
      return std::trunc(v);
    case rm:
      return std::floor(v);
    case rp:
      return std::ceil(v);
    default:
      return std::nearbyint(v);
  }
}
template <class T>
T clamp_integer(double v) {
  constexpr T lo = std::numeric_limits<T>::min(), hi = std::numeric_limits<T>::max();
  return v != v ? T(0) : v <= (double)lo ? lo : v >= (double)hi ? hi : (T)v;
}
template <class T, class S>
T clamp_integer_to(S v) {
  using Wide = __int128;
  return T(std::clamp<Wide>(v, std::numeric_limits<T>::min(), std::numeric_limits<T>::max()));
}
// the float next to v on the side that the rounding mode asks for
template <class S>
float directed_float(S v, int how) {
  float f = (float)v;
  using Exact = std::conditional_t<std::is_integral_v<S>, long double, double>;
  Exact got = f, want = v;
  if (got == want || want != want) return f;
  bool above = got > want;
  if (how == rz && (want > 0) == above) return std::nextafter(f, 0.f);
  if (how == rm && above) return std::nextafter(f, -INFINITY);
  if (how == rp && !above) return std::nextafter(f, INFINITY);
  return f;
}

struct Mode {
  int round, integral;  // integral: -1 keeps the fraction
  bool sat, relu;
};
Mode mode_of(const Instr& i) {
  return {int(i.aux & 15), int(i.aux >> 4 & 15) - 1, bool(i.aux >> 8 & 1), bool(i.aux >> 9 & 1)};
}

template <class T, class S>
T to_float(S v, Mode mode) {  // S: double or an integer
  if constexpr (std::is_floating_point_v<S>) {
    if (mode.integral >= 0) v = to_integral(v, mode.integral);
    if (mode.sat) v = v != v ? 0 : std::min(1., std::max(0., v));
    if (mode.relu) v = v > 0 || v != v ? v : 0;
  }
  if constexpr (std::is_same_v<T, double>) return (double)v;
  if constexpr (std::is_same_v<T, float>) return mode.round == rn ? (float)v : directed_float(v, mode.round);
  if constexpr (std::is_same_v<T, f16>)
    return {mode.round == rz ? float_to_half_rz((float)v) : double_to_half((double)v)};
  if constexpr (std::is_same_v<T, bf16>)
    return {mode.round == rz ? float_to_bf16_rz((float)v) : double_to_bf16((double)v)};
  if constexpr (std::is_same_v<T, tf32>) {
    uint32_t u = as_u32((float)v);
    return {mode.round == rz    ? u & 0xffffe000u
            : mode.round == rna ? round_tf32((float)v)
                                : round_tf32_even(u)};
  }
}
template <class To, class From>
To convert(From x, Mode mode) {
  if constexpr (std::is_integral_v<From>) {
    if constexpr (std::is_integral_v<To>)
      return mode.sat ? clamp_integer_to<To>(x) : To(x);
    else
      return to_float<To>(x, mode);
  } else {
    double v = up(x);
    if constexpr (std::is_integral_v<To>)
      return clamp_integer<To>(to_integral(v, mode.integral >= 0 ? mode.integral : mode.round));
    else
      return to_float<To>(v, mode);
  }
}
template <class To, class From>
void cvt(Warp& w, const Instr& i, uint32_t m) {
  Lanes d = dst(w, i.ops[0]);
  const uint64_t* a = w.row(i.ops[1]);
  Mode mode = mode_of(i);
  each_lane(m, [&](int l) { wr<To>(d, l, convert<To>(rd<From>(a, l), mode)); });
}
// the usual ones, without a question asked per lane
template <class To, class From>
void cvt_plain(Warp& w, const Instr& i, uint32_t m) {
  Lanes d = dst(w, i.ops[0]);
  const uint64_t* a = w.row(i.ops[1]);
  each_lane(m, [&](int l) {
    From x = rd<From>(a, l);
    if constexpr (std::is_same_v<To, f16>)
      wr<To>(d, l, {float_to_half(x)});
    else if constexpr (std::is_same_v<To, bf16>)
      wr<To>(d, l, {float_to_bf16(x)});
    else if constexpr (std::is_arithmetic_v<From>)
      wr<To>(d, l, To(x));
    else
      wr<To>(d, l, up(x));
  });
}

template <class F>
Execute for_any(const std::string& t, F f) {
  if (t == "u8" || t == "b8") return f.template operator()<uint8_t>();
  if (t == "s8") return f.template operator()<int8_t>();
  if (t == "tf32") return f.template operator()<tf32>();
  if (Execute e = for_integer(t, f)) return e;
  return for_float(t, f);
}
Execute plain_for(const std::string& to, const std::string& from) {
  if (to == "f32" && from == "f16") return cvt_plain<float, f16>;
  if (to == "f32" && from == "bf16") return cvt_plain<float, bf16>;
  if (to == "f32" && from == "s32") return cvt_plain<float, int32_t>;
  if (to == "f32" && from == "u32") return cvt_plain<float, uint32_t>;
  if (to == "f16" && from == "f32") return cvt_plain<f16, float>;
  if (to == "bf16" && from == "f32") return cvt_plain<bf16, float>;
  return nullptr;
}

// ---- two results in one register ----
uint16_t to_16(float x, bool bf, bool zero, bool relu) {
  if (relu) x = x > 0 || x != x ? x : 0;
  return bf ? (zero ? float_to_bf16_rz(x) : float_to_bf16(x))
            : (zero ? float_to_half_rz(x) : float_to_half(x));
}
template <bool bf>
void cvt_pair(Warp& w, const Instr& i, uint32_t m) {  // cvt.rn.{f16x2,bf16x2}.f32 d, high, low
  Lanes d = dst(w, i.ops[0]);
  const uint64_t *a = w.row(i.ops[1]), *b = w.row(i.ops[2]);
  Mode mode = mode_of(i);
  each_lane(m, [&](int l) {
    uint32_t high = to_16(rd<float>(a, l), bf, mode.round == rz, mode.relu);
    wr<uint32_t>(d, l, high << 16 | to_16(rd<float>(b, l), bf, mode.round == rz, mode.relu));
  });
}
// What the packed formats of eight and fewer bits are made of: two codes of `bits`, the first operand above.
template <int bits, class Encode>
void pack_codes(Warp& w, const Instr& i, uint32_t m, Encode encode) {
  Lanes d = dst(w, i.ops[0]);
  const uint64_t* a = w.row(i.ops[1]);
  const uint64_t* b = i.ops.size() > 2 ? w.row(i.ops[2]) : nullptr;
  bool relu = mode_of(i).relu;
  auto clip = [=](float x) { return relu && !(x > 0) && x == x ? 0.f : x; };
  for (int l : lanes_of(m)) {
    float high, low;
    if (b) {
      high = rd<float>(a, l), low = rd<float>(b, l);
    } else {
      auto half = i.aux2 ? bf16_to_float : half_to_float;  // of the type of the packed source
      high = half(uint16_t(a[l] >> 16)), low = half(uint16_t(a[l]));
    }
    d[l] = uint64_t(encode(clip(high))) << bits | encode(clip(low));
  }
}
template <bool e5m2>
void to_f8x2(Warp& w, const Instr& i, uint32_t m) {
  pack_codes<8>(w, i, m, [](float x) { return float_to_f8(x, e5m2); });
}
void to_f4x2(Warp& w, const Instr& i, uint32_t m) { pack_codes<4>(w, i, m, float_to_f4); }
void to_ue8m0x2(Warp& w, const Instr& i, uint32_t m) {
  bool up = mode_of(i).round == rp;
  pack_codes<8>(w, i, m, [=](float x) { return float_to_ue8m0(x, up); });
}
template <int bits, class Decode>
void unpack_codes(Warp& w, const Instr& i, uint32_t m, Decode value) {
  Lanes d = dst(w, i.ops[0]);
  const uint64_t* a = w.row(i.ops[1]);
  Mode mode = mode_of(i);
  auto one = [&](uint64_t code) {
    float x = value(uint8_t(code & ((1 << bits) - 1)));
    return uint32_t(to_16(x, i.aux2, false, mode.relu));
  };
  for (int l : lanes_of(m)) d[l] = one(a[l] >> bits) << 16 | one(a[l]);
}
template <bool e5m2>
void from_f8x2(Warp& w, const Instr& i, uint32_t m) {
  unpack_codes<8>(w, i, m, [](uint8_t v) { return f8_to_float(v, e5m2); });
}
void from_f4x2(Warp& w, const Instr& i, uint32_t m) { unpack_codes<4>(w, i, m, f4_to_float); }
void from_ue8m0x2(Warp& w, const Instr& i, uint32_t m) { unpack_codes<8>(w, i, m, ue8m0_to_float); }

template <class T>
void pack_integers(Warp& w, const Instr& i, uint32_t m) {  // cvt.pack.sat.{s8,u8}.s32.b32 d, a, b, c
  Lanes d = dst(w, i.ops[0]);
  const uint64_t *a = w.row(i.ops[1]), *b = w.row(i.ops[2]);
  const uint64_t* c = i.ops.size() > 3 ? w.row(i.ops[3]) : nullptr;
  using U = std::make_unsigned_t<T>;
  auto clip = [](int32_t x) { return uint32_t(U(clamp_integer_to<T>(x))); };
  constexpr int bits = 8 * sizeof(T);
  for (int l : lanes_of(m)) {
    uint64_t above = c ? uint64_t(uint32_t(c[l])) << (2 * bits) : 0;
    d[l] = uint32_t(above | clip(rd<int32_t>(a, l)) << bits | clip(rd<int32_t>(b, l)));
  }
}
Execute packed_for(const std::string& to, const std::string& from) {
  if (to == "f16x2" && from == "f32") return cvt_pair<false>;
  if (to == "bf16x2" && from == "f32") return cvt_pair<true>;
  if (to == "e4m3x2") return to_f8x2<false>;
  if (to == "e5m2x2") return to_f8x2<true>;
  if (to == "e2m1x2") return to_f4x2;
  if (to == "ue8m0x2") return to_ue8m0x2;
  if (from == "e4m3x2") return from_f8x2<false>;
  if (from == "e5m2x2") return from_f8x2<true>;
  if (from == "e2m1x2") return from_f4x2;
  if (from == "ue8m0x2") return from_ue8m0x2;
  return nullptr;
}

void decode_cvt(Instr& i, const Opcode& o) {
  std::string from = o.type(), to = o.mods.size() > 1 ? o.mods[o.mods.size() - 2] : "";
  if (o.has("pack")) {
    to = o.mods[o.mods.size() - 3];
    if (from != "b32") to = o.mods[o.mods.size() - 2];
    i.fn = to == "u8"    ? pack_integers<uint8_t>
           : to == "s8"  ? pack_integers<int8_t>
           : to == "u16" ? pack_integers<uint16_t>
           : to == "s16" ? pack_integers<int16_t>
                         : nullptr;
    required(i.fn, o);
    return;
  }
  int round = std::max(0, which(o, kRound)), integral = which(o, kRoundInteger);
  i.aux = round | (integral + 1) << 4 | int(o.has("sat")) << 8 | int(o.has("relu")) << 9;
  i.aux2 = to == "bf16x2" || from == "bf16x2";
  if ((i.fn = packed_for(to, from))) return;
  if (i.aux == rn && (i.fn = plain_for(to, from))) return;
  i.fn = for_any(
      to, [&]<class To>() { return for_any(from, []<class From>() -> Execute { return cvt<To, From>; }); });
  required(i.fn, o);
}

}  // namespace

void add_convert(DecoderTable& t) { t["cvt"] = decode_cvt; }

}  // namespace cusim
