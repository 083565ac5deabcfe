// What mma and wgmma share: element types, fragments as arrays, and the product itself.
#pragma once
#include "instruction.hpp"

namespace cusim {

enum class Elem : uint8_t { F16, BF16, TF32, F64, S8, U8, S4, U4, E4M3, E5M2 };
constexpr int elem_bits(Elem e) {
  switch (e) {
    case Elem::F16:
    case Elem::BF16:
      return 16;
    case Elem::TF32:
      return 32;
    case Elem::F64:
      return 64;
    case Elem::S4:
    case Elem::U4:
      return 4;
    default:
      return 8;
  }
}
// Elements that one register of a fragment holds.
constexpr int elem_per_register(Elem e) { return e == Elem::F64 ? 1 : 32 / elem_bits(e); }
constexpr bool elem_is_integer(Elem e) { return e >= Elem::S8 && e <= Elem::U4; }
Elem elem_of(const std::string& name, const Opcode& op);

enum class Acc : uint8_t { F32, F16, S32, F64 };
// Sums are kept in the type of the accumulator; integers wide enough to see them saturate.
template <Acc A>
using Sum = std::conditional_t<A == Acc::F64, double, std::conditional_t<A == Acc::S32, int64_t, float>>;

// `count` consecutive elements at p, as numbers.
template <Elem E, class T>
inline void elements(const void* p, int count, T* out) {
  auto* bytes = (const uint8_t*)p;
  for (int k = 0; k < count; ++k) {
    if constexpr (E == Elem::F16 || E == Elem::BF16) {
      uint16_t v;
      memcpy(&v, bytes + 2 * k, 2);
      out[k] = T(E == Elem::F16 ? half_to_float(v) : bf16_to_float(v));
    } else if constexpr (E == Elem::TF32) {
      uint32_t v;
      memcpy(&v, bytes + 4 * k, 4);
      out[k] = T(to_tf32(v));
    } else if constexpr (E == Elem::F64) {
      double v;
      memcpy(&v, bytes + 8 * k, 8);
      out[k] = T(v);
    } else if constexpr (E == Elem::S4 || E == Elem::U4) {
      int v = bytes[k / 2] >> (4 * (k % 2)) & 15;
      out[k] = T(E == Elem::S4 && v >= 8 ? v - 16 : v);
    } else if constexpr (E == Elem::S8) {
      out[k] = T(int8_t(bytes[k]));
    } else if constexpr (E == Elem::U8) {
      out[k] = T(bytes[k]);
    } else {
      out[k] = T(f8_table(E == Elem::E5M2)[bytes[k]]);
    }
  }
}

// One register of a fragment in 32 lanes: 8 rows, each of 4 lanes' elements side by side.
template <Elem E, class T>
inline void fragment(const uint64_t* row, T* out) {
  if constexpr (E == Elem::F64) {
    elements<E>(row, kLanes, out);
  } else {
    uint32_t packed[kLanes];
    for (int l = 0; l < kLanes; ++l) packed[l] = uint32_t(row[l]);
    elements<E>(packed, kLanes * elem_per_register(E), out);
  }
}

// c[M][8] += a[M][K] * b[K][8], k in order; the columns side by side in a vector of the host
template <class T>
inline void multiply_add(T (*c)[8], const T* a, int a_stride, const T (*b)[8], int rows, int depth) {
  typedef T Row __attribute__((vector_size(8 * sizeof(T))));
  constexpr int kRows = 8;  // at a time, so that their sums do not wait for one another
  for (int r = 0; r < rows; r += kRows) {
    Row sum[kRows], right;
    memcpy(sum, c[r], sizeof sum);
    for (int k = 0; k < depth; ++k) {
      memcpy(&right, b[k], sizeof right);
      for (int q = 0; q < kRows; ++q) sum[q] += a[(r + q) * a_stride + k] * right;
    }
    memcpy(c[r], sum, sizeof sum);
  }
}

// The accumulator registers of 8 columns: element (row, column) of lane l in register g is
// (l / 4 + 8 * (g / 2), l % 4 * 2 + g % 2); f16 keeps a pair in each register.
template <Acc A, class T>
inline void load_accumulator(const uint64_t* const* regs, int rows, T (*c)[8]) {
  for (int g = 0; g < rows / 4; ++g)
    for (int l = 0; l < kLanes; ++l) {
      T& to = (&c[8 * (g >> 1)][g & 1])[l * 2];  // rows of eight follow one another
      if constexpr (A == Acc::F16)
        to = half_to_float(uint16_t(regs[g / 2][l] >> (16 * (g & 1))));
      else if constexpr (A == Acc::F32)
        to = as_f32(uint32_t(regs[g][l]));
      else if constexpr (A == Acc::S32)
        to = int32_t(regs[g][l]);
      else
        to = std::bit_cast<double>(regs[g][l]);
    }
}
template <Acc A, class T>
inline void store_accumulator(uint64_t* const* regs, int rows, const T (*c)[8], bool saturate) {
  for (int g = 0; g < rows / 4; ++g)
    for (int l = 0; l < kLanes; ++l) {
      T v = (&c[8 * (g >> 1)][g & 1])[l * 2];
      if constexpr (A == Acc::F16) {
        uint64_t half = float_to_half(v);
        regs[g / 2][l] = g & 1 ? (regs[g / 2][l] & 0xffff) | half << 16 : half;
      } else if constexpr (A == Acc::F32) {
        regs[g][l] = as_u32(v);
      } else if constexpr (A == Acc::S32) {
        if (saturate) v = v > INT32_MAX ? INT32_MAX : v < INT32_MIN ? INT32_MIN : v;
        regs[g][l] = uint32_t(v);
      } else {
        regs[g][l] = std::bit_cast<uint64_t>(v);
      }
    }
}

}  // namespace cusim
