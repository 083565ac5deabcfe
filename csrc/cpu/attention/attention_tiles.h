// The products of attention, and the packing of their operands.
//
// Queries lie across lanes: a tile is kWidth rows of q (4 vectors at 16 lanes, 2 below), and scores are kept
// as S^T [key][row], so that the softmax never adds or compares across lanes. In every product
//
//     c[Rows][Vecs * kLanes] (+)= a[Rows][steps] panel[steps][Vecs * kLanes]
//
// a vector of the panel is loaded once for all rows of a register tile and a word of `a` is broadcast: 6 x 4
// accumulators, 10 loads to 24 multiply-adds. A word is one float or, where the machine multiplies bfloat16,
// a pair of them, neighbours along the contraction:
//
//     product        a                         panel                   c
//     S^T  = K Q^T   K    [key][dim]           Q^T  [dim][row]         [key][row]
//     O^T  = V^T P^T V    [key][dim_v] turned  P^T  [key][row]         [dim_v][row]
//     dP^T = V dO^T  V    [key][dim_v]         dO^T [dim_v][row]       [key][row]
//     dV   = P^T dO  P^T  [key][row]           dO   [row][dim_v]       [key][dim_v]
//     dK   = dS^T Q  dS^T [key][row]           Q    [row][dim]         [key][dim]
//     dQ^T = K^T dS^T K   [key][dim] turned    dS^T [key][row]         [dim][row]
//
// "natural" is [row][dim] with pairs along dim, "turned" [row][dim] with pairs along rows: what contracts
// over dim reads the first, what contracts over rows the second. Rows come in even numbers.
#pragma once

#include <type_traits>

#include "cpu/attention/attention.h"
#include "cpu/core/elements.h"
#include "cpu/linear/matmul.h"

namespace bitfuse::BITFUSE_ISA {

// A word is a float.
struct Singles {
  static constexpr int kDepth = 1;  // elements of a word
  // Steps summed apart: a float's rounding grows with the square root of the steps / kSegment, not of the
  // steps.
  static constexpr int64_t kSegment = 16;
  static BITFUSE_INLINE Vf dot(Vf acc, uint32_t a, Vi panel) {
    float f;
    std::memcpy(&f, &a, 4);
    return fma(set1(f), as_float(panel), acc);
  }
};

#if BITFUSE_PAIRS
// A word is two bfloat16, the first in its low half.
struct Pairs {
  static constexpr int kDepth = 2;
  static constexpr int64_t kSegment = int64_t(1) << 40;
  static BITFUSE_INLINE Vf dot(Vf acc, uint32_t a, Vi panel) { return dot_pairs(acc, panel, set1_dwords(a)); }
  // Words of lanes a and b, rounded.
  static BITFUSE_INLINE Vi words(Vf a, Vf b) { return pair_of_rounded(a, b); }
};
#endif

// ------------------------------------------------------------------------------------------- the product

enum class Into { kSet, kAdd, kRescale };  // kRescale: c = c * rescale[lane] + the product

constexpr int max_rows(int vecs) {
  return kLanes == 16 ? (vecs == 4 ? 6 : vecs == 3 ? 8 : 12) : (vecs == 2 ? 6 : 12);
}

template <class Dot, bool Turned, int Vecs, int Rows>
void product_tile(const uint32_t* a, int64_t a_stride, const uint32_t* panel, int64_t steps, float* c,
                  int64_t c_stride, Into into, const float* rescale) {
  Vf acc[Rows][Vecs];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < Vecs; ++v) acc[r][v] = zero();
  for (int64_t i = 0; i < steps; ++i) {
    Vi b[Vecs];
#pragma GCC unroll 8
    for (int v = 0; v < Vecs; ++v) b[v] = load_dwords(panel + v * kLanes);
    panel += Vecs * kLanes;
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const uint32_t word = Turned ? a[r] : a[r * a_stride];
#pragma GCC unroll 8
      for (int v = 0; v < Vecs; ++v) acc[r][v] = Dot::dot(acc[r][v], word, b[v]);
    }
    a += Turned ? a_stride : 1;
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < Vecs; ++v) {
      float* at = c + r * c_stride + v * kLanes;
      if (into == Into::kRescale) {
        acc[r][v] = fma(load(at), load(rescale + v * kLanes), acc[r][v]);
      } else if (into == Into::kAdd) {
        acc[r][v] = add(load(at), acc[r][v]);
      }
      store(at, acc[r][v]);
    }
}

template <class Dot, bool Turned, int Vecs>
void product_rows(const uint32_t* a, int64_t a_stride, int64_t rows, const uint32_t* panel, int64_t steps,
                  float* c, int64_t c_stride, Into into, const float* rescale) {
  constexpr int kRows = max_rows(Vecs);
  int64_t r = 0;
  auto tile = [&](auto fixed) __attribute__((always_inline)) {
    constexpr int Rows = decltype(fixed)::value;
    const uint32_t* from = Turned ? a + r : a + r * a_stride;
    for (int64_t i = 0; i < steps; i += Dot::kSegment) {
      product_tile<Dot, Turned, Vecs, Rows>(from + (Turned ? i * a_stride : i), a_stride,
                                            panel + i * Vecs * kLanes, least(steps - i, Dot::kSegment),
                                            c + r * c_stride, c_stride, i ? Into::kAdd : into, rescale);
    }
  };
  for (; r + kRows <= rows; r += kRows) tile(std::integral_constant<int, kRows>{});
  switch (rows - r) {
    case 10:
      return tile(std::integral_constant < int, kRows<10 ? 2 : 10>{});
    case 8:
      return tile(std::integral_constant < int, kRows<8 ? 2 : 8>{});
    case 6:
      return tile(std::integral_constant<int, 6>{});
    case 4:
      return tile(std::integral_constant<int, 4>{});
    case 2:
      return tile(std::integral_constant<int, 2>{});
  }
}

// rows: even. The panel is dense, vecs * kLanes words a step.
template <class Dot, bool Turned>
void product(const uint32_t* a, int64_t a_stride, int64_t rows, const uint32_t* panel, int vecs,
             int64_t steps, float* c, int64_t c_stride, Into into, const float* rescale = nullptr) {
  auto run = [&](auto fixed) {
    product_rows<Dot, Turned, decltype(fixed)::value>(a, a_stride, rows, panel, steps, c, c_stride, into,
                                                      rescale);
  };
  if (vecs == kVecs) return run(std::integral_constant<int, kVecs>{});
  if constexpr (kVecs == 4) {
    if (vecs == 3) return run(std::integral_constant<int, 3>{});
    if (vecs == 2) return run(std::integral_constant<int, 2>{});
  }
  run(std::integral_constant<int, 1>{});
}

// ------------------------------------------------------------------------------------------- packing

BITFUSE_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
// Words of a row of `dim` elements, natural and turned, padded to whole vectors.
template <class Dot>
BITFUSE_INLINE int64_t natural_pitch(int64_t dim) {
  return round_up(ceil_div(dim, Dot::kDepth), kLanes);
}
BITFUSE_INLINE int64_t turned_pitch(int64_t dim) { return round_up(dim, kLanes); }

template <class Type>
BITFUSE_INLINE const Type* row_of(const HeadRows& view, int64_t batch, int64_t row, int64_t head) {
  return static_cast<const Type*>(view.data) + batch * view.batch + row * view.row + head * view.head;
}

// kLanes elements of a row of `dim` from `at`, as floats; zeros past its end.
template <class Elements>
BITFUSE_INLINE Vf load_row(const typename Elements::Type* p, int64_t at, int64_t dim) {
  if (at + kLanes <= dim) return Elements::whole(p + at);
  return at < dim ? Elements::some(p + at, int(dim - at)) : zero();
}

// kLanes words of a row, natural, from element `at`.
template <class Dot, class Elements>
BITFUSE_INLINE Vi load_words(const typename Elements::Type* p, int64_t at, int64_t dim) {
#if BITFUSE_PAIRS
  if constexpr (Dot::kDepth == 2) {
    if (at + 2 * kLanes <= dim) return load_dwords(p + at);
    return load_bytes(p + at, 2 * (dim - at));
  } else
#endif
    return as_dwords(load_row<Elements>(p, at, dim));
}

// Rows of one head lie apart, where no prefetcher of the machine finds them.
constexpr int64_t kPrefetchRows = 16;
template <class Type>
BITFUSE_INLINE void prefetch_row(const Type* p, int64_t dim) {
  for (int64_t i = 0; i < dim; i += int64_t(64 / sizeof(Type))) __builtin_prefetch(p + i);
}

// to[rows rounded up to even][natural_pitch(dim)]; row(r) is the address of row r.
template <class Dot, class Elements, class Row>
BITFUSE_INLINE void pack_natural(Row row, int64_t rows, int64_t dim, uint32_t* to) {
  const int64_t pitch = natural_pitch<Dot>(dim);
  for (int64_t r = 0; r < rows; ++r, to += pitch) {
    const typename Elements::Type* p = row(r);
    if (r + kPrefetchRows < rows) prefetch_row(row(r + kPrefetchRows), dim);
    for (int64_t i = 0; i < pitch; i += kLanes)
      store_dwords(to + i, load_words<Dot, Elements>(p, i * Dot::kDepth, dim));
  }
  if (rows % 2) std::memset(to, 0, size_t(pitch) * 4);
}

// Columns [from, from + width) of to[ceil(rows / kDepth)][width], width a multiple of kLanes. With rows that
// count one word, of [rows rounded up to even].
template <class Dot, class Elements, class Row>
BITFUSE_INLINE void pack_turned(Row row, int64_t rows, int64_t dim, int64_t from, int64_t width,
                                uint32_t* to) {
  for (int64_t r = 0; r < rows; r += Dot::kDepth, to += width) {
    const typename Elements::Type* p = row(r);
    for (int64_t i = r + kPrefetchRows; i < least(rows, r + kPrefetchRows + Dot::kDepth); ++i)
      prefetch_row(row(i), dim);
#if BITFUSE_PAIRS
    if constexpr (Dot::kDepth == 2) {
      const typename Elements::Type* next = r + 1 < rows ? row(r + 1) : nullptr;
      for (int64_t i = 0; i < width; i += kLanes) {
        const Vf low = load_row<Elements>(p, from + i, dim);
        const Vf high = next ? load_row<Elements>(next, from + i, dim) : zero();
        store_dwords(to + i, pair_of_exact(low, high));
      }
      continue;
    }
#endif
    for (int64_t i = 0; i < width; i += kLanes)
      store_dwords(to + i, as_dwords(load_row<Elements>(p, from + i, dim)));
  }
  if (Dot::kDepth == 1 && rows % 2) std::memset(to, 0, size_t(width) * 4);
}

// panel[words][vecs * kLanes] = the transpose of `rows` natural rows [rows][pitch]; lanes past them are zero.
inline void turn(const uint32_t* natural, int64_t rows, int64_t pitch, int64_t words, int vecs,
                 uint32_t* panel) {
  const int64_t width = vecs * kLanes;
  for (int64_t r = 0; r < width; r += kLanes) {
    for (int64_t i = 0; i < words; i += kLanes) {
      Vi block[kLanes];
      for (int j = 0; j < kLanes; ++j)
        block[j] = r + j < rows ? load_dwords(natural + (r + j) * pitch + i) : set1_dwords(0);
      transpose(block);
      const int64_t count = least(kLanes, words - i);
      for (int64_t j = 0; j < count; ++j) store_dwords(panel + (i + j) * width + r, block[j]);
    }
  }
}

// Rows `row(r)` of `dim` elements = the transpose of c[dim][vecs * kLanes], times factor[lane]. c has dim
// rounded up to kLanes rows.
template <class Elements, class Row>
BITFUSE_INLINE void write_turned(const float* c, int64_t dim, int64_t rows, int vecs, const float* factor,
                                 Row row) {
  const int64_t width = vecs * kLanes;
  for (int64_t r = 0; r < rows; r += kLanes) {
    const Vf f = load(factor + r);
    const int64_t count = least(kLanes, rows - r);
    for (int64_t i = 0; i < dim; i += kLanes) {
      Vi block[kLanes];
      for (int j = 0; j < kLanes; ++j) block[j] = as_dwords(mul(load(c + (i + j) * width + r), f));
      transpose(block);
      const int64_t left = dim - i;
      for (int64_t j = 0; j < count; ++j) {
        typename Elements::Type* to = row(r + j) + i;
        if (left >= kLanes) {
          Elements::put(to, as_float(block[j]));
        } else {
          put_some<Elements>(to, as_float(block[j]), int(left));
        }
      }
    }
  }
}

}  // namespace bitfuse::BITFUSE_ISA
