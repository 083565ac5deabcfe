// lowbit_embedding on the CPU: rows of W by their numbers, decoded as they are read.
//
// A row of k numbers is k * bits / 8 bytes of codes and its scales in, and k floats out: at 4 bits to bfloat16
// 2.6 bytes a number, of which 2 are written. Rows lie far apart; within one, memory is read in order. The
// row's scales, and zero points where there are any, are spread to one for each number in the nearest cache, so
// that groups of any size take the same loop: two loads, a table and a multiplication a vector.
#include "cpu/linear/lowbit_embedding.h"

#include <cstring>

#include "cpu/core/elements.h"
#include "cpu/linear/codes.h"
#include "cpu/linear/scales.h"

namespace bitfuse::BITFUSE_ISA {
namespace {

// Of each thread: a number for each group, then one for each column.
struct Room {
  float *groups, *scales, *zeros;  // zeros: or offsets, negated
  uint8_t* codes;                  // of a row, widened to 4 bits
};

void spread(const float* groups, int64_t count, int64_t size, float* to) {
  for (int64_t g = 0; g < count; ++g)
    for (int64_t i = 0; i < size; ++i) to[g * size + i] = groups[g];
}

template <class Code, class Elements>
void decode(const LowBitMatrix& w, const Code& code, int64_t row, const Room& room,
            typename Elements::Type* out) {
  const int64_t groups = groups_of(w);
  read_scales(w, row, 1, room.groups);
  spread(room.groups, groups, w.group_size, room.scales);
  if (Code::kZeros) {
    if (w.offsets) {
      read_offsets(w, row, 1, room.groups);
      for (int64_t g = 0; g < groups; ++g) room.groups[g] = -room.groups[g];
    } else {
      read_zeros(w, row, 1, room.groups);
    }
    spread(room.groups, groups, w.group_size, room.zeros);
  }
  const int bits = bits_of(w.code_kind);
  const uint8_t* codes = w.codes + row * (w.k * bits / 8);
  if (Code::kBits == 4 && bits < 4) {
    with_chunk<Code>(bits, [&](auto chunk) __attribute__((always_inline)) {
      using Chunk = decltype(chunk);
      for (int64_t c = 0, left; (left = w.k / 8 - c) > 0; c += kLanes) {
        const uint8_t* at = codes + c * Chunk::kBytes;
        store_dwords(room.codes + 4 * c, left >= kLanes ? Chunk::load(at) : load_chunks<Chunk>(at, left));
      }
    });
    codes = room.codes;
  }
  auto value = [&](const uint8_t* at, int64_t i) __attribute__((always_inline)) {
    const Vi dwords = Code::natural(at);
    const Vf other = Code::kZeros ? load(room.zeros + i) : zero();
    if (Code::kZeros && w.offsets)
      return fma(code.template value<0>(dwords, zero()), load(room.scales + i), other);
    Vf v = code.template value<0>(dwords, other);
    if constexpr (Code::kNans) v = add(v, nan_lanes(dwords));
    return mul(v, load(room.scales + i));
  };
  int64_t i = 0;
  for (; i + kLanes <= w.k; i += kLanes) Elements::put(out + i, value(codes + code_bytes<Code>(i), i));
  if (i < w.k) {
    uint8_t rest[kLanes] = {};
    std::memcpy(rest, codes + code_bytes<Code>(i), size_t(code_bytes<Code>(w.k - i)));
    put_some<Elements>(out + i, value(rest, i), int(w.k - i));
  }
}

}  // namespace

void lowbit_embedding(const LowbitEmbeddingArgs& call) {
  const LowBitMatrix& w = call.w;
  const bool zeros = w.zeros || w.offsets;
  const int threads = int(least(threads_for(call.count * w.k * 8), most(call.count, 1)));
  auto carve = [&](Carver& carver) {
    const int64_t padded = round_up(w.k, kLanes);
    return Room{carver.take<float>(groups_of(w)), carver.take<float>(padded),
                carver.take<float>(zeros ? padded : 0),
                carver.take<uint8_t>(bits_of(w.code_kind) < 4 ? 4 * padded : 0)};
  };
  Carver one;
  carve(one);
  char* block = scratch(one.used() * size_t(threads));
  with_code(w, [&](auto code) {
    with_elements(call.dtype, [&](auto elements) {
      using Elements = decltype(elements);
      auto* out = static_cast<typename Elements::Type*>(call.out);
      parallel(threads, [&](int thread, int team) {
        Carver carver(block + one.used() * size_t(thread));
        const Room room = carve(carver);
        // what lies past the last column is multiplied, and not kept
        std::memset(room.scales, 0, size_t(round_up(w.k, kLanes)) * 4);
        if (zeros) std::memset(room.zeros, 0, size_t(round_up(w.k, kLanes)) * 4);
        const Range mine = share(call.count, thread, team);
        for (int64_t i = mine.begin; i < mine.end; ++i) {
          const int64_t row = call.wide ? static_cast<const int64_t*>(call.indices)[i]
                                        : int64_t(static_cast<const int32_t*>(call.indices)[i]);
          decode<decltype(code), Elements>(w, code, row, room, out + i * w.k);
        }
      });
    });
  });
}

}  // namespace bitfuse::BITFUSE_ISA
