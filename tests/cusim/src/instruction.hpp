// What the files of instructions share: lanes, 16-bit floats, operands and the decoder's table.
#pragma once
#include <type_traits>

#include "cusim.hpp"
#include "numeric.hpp"

namespace cusim {

// ---- the lanes of a mask ----
struct LaneSet {
  struct Iterator {
    uint32_t left;
    int operator*() const { return std::countr_zero(left); }
    Iterator& operator++() {
      left &= left - 1;
      return *this;
    }
    bool operator!=(const Iterator& o) const { return left != o.left; }
  };
  uint32_t mask;
  Iterator begin() const { return {mask}; }
  Iterator end() const { return {0}; }
};
inline LaneSet lanes_of(uint32_t mask) { return {mask}; }

// The same for a body that touches only its own lane's values: the compiler may run lanes side by side.
template <class F>
inline void each_lane(uint32_t mask, F&& f) {
  if (mask == kAllLanes) {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) f(l);
  } else {
    for (int l : lanes_of(mask)) f(l);
  }
}

template <class T>
inline T rd(const uint64_t* r, int l) {
  T v;
  memcpy(&v, &r[l], sizeof(T));
  return v;
}
template <class T>
inline void wr(Lanes r, int l, T v) {
  if constexpr (std::is_integral_v<T> && std::is_signed_v<T>) {
    r[l] = (uint64_t)(int64_t)v;
  } else {
    uint64_t u = 0;
    memcpy(&u, &v, sizeof(T));
    r[l] = u;
  }
}

// ---- 16-bit floats ----
struct f16 {
  uint16_t b;
};
struct bf16 {
  uint16_t b;
};
struct f16x2 {
  uint16_t b[2];
};
struct bf16x2 {
  uint16_t b[2];
};
template <class T2>
struct half_of;
template <>
struct half_of<f16x2> {
  using type = f16;
};
template <>
struct half_of<bf16x2> {
  using type = bf16;
};
template <class T>
constexpr bool is_pair = std::is_same_v<T, f16x2> || std::is_same_v<T, bf16x2>;

inline float up(f16 x) { return half_to_float(x.b); }
inline float up(bf16 x) { return bf16_to_float(x.b); }
inline float up(float x) { return x; }
inline double up(double x) { return x; }
inline void down(double v, f16& o) { o.b = double_to_half(v); }
inline void down(double v, bf16& o) { o.b = double_to_bf16(v); }
inline void down(double v, float& o) { o = (float)v; }
inline void down(double v, double& o) { o = v; }

// f on both halves of a pair
template <class T2, class F, class... Pairs>
inline T2 both(F f, Pairs... p) {
  using H = typename half_of<T2>::type;
  T2 r;
  for (int k = 0; k < 2; ++k) r.b[k] = f(H{p.b[k]}...).b;
  return r;
}

// ---- operands ----
inline bool truth(const Warp& w, const Operand& o, int l) { return (w.row(o)[l] & 1) != (uint64_t)o.negate; }
inline Lanes dst(Warp& w, const Operand& o) {
  static thread_local uint64_t sink[kLanes];  // '_'
  return o.kind == Operand::Sink ? sink : w.row(o);
}
void nop(Warp& w, const Instr& i, uint32_t m);

// ---- decoding ----
using Decoder = void (*)(Instr& i, const Opcode& op);
using DecoderTable = std::unordered_map<std::string, Decoder>;
void add_arithmetic(DecoderTable& t);
void add_compare(DecoderTable& t);
void add_convert(DecoderTable& t);
void add_memory(DecoderTable& t);
void add_warp(DecoderTable& t);
void add_tensor_core(DecoderTable& t);
void add_wgmma(DecoderTable& t);
void add_mbarrier(DecoderTable& t);
void add_bulk(DecoderTable& t);
void decode_bulk(Instr& i, const Opcode& op);
void decode_cp_async_mbarrier(Instr& i, const Opcode& op);

[[noreturn]] inline void unsupported(const Opcode& op) {
  throw Fault("instruction '" + op.text() + "' is not supported by cusim");
}
Space space_of(const Opcode& op);
inline void collective(Instr& i, bool member) {
  i.flow = Flow::Collective;
  i.has_member = member;
}
// the index of the modifier that the opcode has, or -1
template <size_t N>
inline int which(const Opcode& op, const char* const (&mods)[N]) {
  for (size_t k = 0; k < N; ++k)
    if (op.has(mods[k])) return (int)k;
  return -1;
}
// Calls f.operator()<T>() with the C++ type of a PTX integer type; null for any other.
template <class F>
inline Execute for_integer(const std::string& t, F f) {
  if (t == "s16") return f.template operator()<int16_t>();
  if (t == "u16" || t == "b16") return f.template operator()<uint16_t>();
  if (t == "s32") return f.template operator()<int32_t>();
  if (t == "u32" || t == "b32") return f.template operator()<uint32_t>();
  if (t == "s64") return f.template operator()<int64_t>();
  if (t == "u64" || t == "b64") return f.template operator()<uint64_t>();
  return nullptr;
}
template <class F>
inline Execute for_float(const std::string& t, F f) {
  if (t == "f32") return f.template operator()<float>();
  if (t == "f64") return f.template operator()<double>();
  if (t == "f16") return f.template operator()<f16>();
  if (t == "bf16") return f.template operator()<bf16>();
  return nullptr;
}
template <class F>
inline Execute for_pair(const std::string& t, F f) {
  if (t == "f16x2") return f.template operator()<f16x2>();
  if (t == "bf16x2") return f.template operator()<bf16x2>();
  return nullptr;
}
inline Execute required(Execute e, const Opcode& op) {
  if (!e) unsupported(op);
  return e;
}

// ---- shapes of instructions ----
template <class T, class F>
inline void unary(Warp& w, const Instr& i, uint32_t m, F f) {
  Lanes d = dst(w, i.ops[0]);
  const uint64_t* a = w.row(i.ops[1]);
  each_lane(m, [&](int l) { wr<T>(d, l, f(rd<T>(a, l))); });
}
template <class T, class F>
inline void binary(Warp& w, const Instr& i, uint32_t m, F f) {
  Lanes d = dst(w, i.ops[0]);
  const uint64_t *a = w.row(i.ops[1]), *b = w.row(i.ops[2]);
  each_lane(m, [&](int l) { wr<T>(d, l, f(rd<T>(a, l), rd<T>(b, l))); });
}
template <class T, class F>
inline void ternary(Warp& w, const Instr& i, uint32_t m, F f) {
  Lanes d = dst(w, i.ops[0]);
  const uint64_t *a = w.row(i.ops[1]), *b = w.row(i.ops[2]), *c = w.row(i.ops[3]);
  each_lane(m, [&](int l) { wr<T>(d, l, f(rd<T>(a, l), rd<T>(b, l), rd<T>(c, l))); });
}

}  // namespace cusim
