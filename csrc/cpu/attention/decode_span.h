// The walk of decode_attention on the CPU over a span of one sequence's keys, for a block of its queries and all
// heads. Units of kUnit tokens are walked head by head:
//
//     s[row][token] = K q       decode_scores.h
//     softmax of each row of s  lanes are tokens; running maximum and sum
//     o[row] += p V             decode_values.h
//
// Rows are the queries of a kv head: all its query heads and all queries of the block, so K and V are read
// from memory once. A unit's K and V of one head (16 KiB each in bfloat16, head_dim 128) stay in L1; while K
// is multiplied, V's lines are asked for, and while V is, the next head's K. Row addresses are looked up once
// a unit, for all heads: pages cost nothing else.
//
// Few bits: K's scales are folded into the queries, a group of tokens at a time, its offsets into q . offset;
// V's scales into the probabilities, its offsets into sums of p * offset. Where the machine multiplies words
// both become int16, the largest product of a row and a group (of a unit for V) 32767, and sums are exact. It
// is the products that are made to fit, not their factors: a channel of K a thousand times the others, of a
// query that is small there, takes no bits from them, nor does a token of few values and much probability.
// Where a product is large itself, so is its share of the sum.
//
// Bound by bytes: 2 rows of dim elements a token and kv head. With 4 query heads a kv head and bfloat16 pairs
// that is 512 bytes for some 60 vector instructions.
#pragma once

#include "common/kv_cache.h"
#include "cpu/attention/attention_scores.h"
#include "cpu/attention/cache_readers.h"
#include "cpu/core/activations.h"

namespace bitfuse::BITFUSE_ISA {
namespace {  // what is called once is inlined

constexpr int64_t kUnit = 64;  // tokens
constexpr int64_t kTile = 4;   // rows of a register tile
constexpr int64_t kPitch = kUnit + kLanes;
constexpr int64_t kDim = kMaxHeadDim;
constexpr int64_t kMostGroups = kDim / 32;  // of channels
constexpr int64_t kOffsets = kLanes > kMostGroups ? kLanes : kMostGroups;
constexpr int64_t kMostBlock = 128;  // channels of a reader's block
constexpr float kWordLargest = 32767;

// What makes words of products whose largest magnitude is `largest`.
BITFUSE_INLINE float word_factor(float largest) {
  constexpr float kMost = 1.2676506e30f;  // 2^100: neither it nor its inverse is lost
  return kWordLargest / kMost < largest ? kWordLargest / largest : kMost;
}

BITFUSE_INLINE void prefetch_row(const char* p, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(p + at);
}

// Where the rows of a unit's tokens lie: of head 0; a head is `head` bytes further.
struct Unit {
  int64_t first, count;  // positions
  const char *k[kUnit], *v[kUnit];
  int64_t row[kUnit];  // page * page_size + slot, of codes
};

struct RowState {
  float most, sum;
};

// What belongs to one row of scores.
struct RowPlace {
  int64_t query;     // of the call
  int64_t position;  // in the sequence; negative: before its first token
  float slope;
};

// What both readers of a call need of its shapes.
struct Plan {
  int64_t group;             // query heads of a kv head
  int64_t block;             // queries of a task
  int64_t rows, row_slots;   // of a kv head in a whole block; rounded up to tiles
  int64_t q_pitch, o_pitch;  // elements of a row
  int64_t span;              // tokens
};

template <class Reader>
class Span {
  using K = Reader;
  using V = Reader;
  using Element = typename Reader::Element;
  using Acc = typename Reader::Acc;
  static_assert(Reader::kBlock <= kMostBlock);
  static constexpr int kWide = V::kPairs ? 4 : kVecs;                   // vectors of channels in a tile
  static constexpr int64_t kStretch = V::kPairs ? 64 : kVecs * kLanes;  // channels of it

 public:
  static constexpr int64_t q_pitch(int64_t dim) { return round_up(dim, K::kBlock) / (K::kPairs ? 2 : 1); }
  // what q of codes takes, twice, and a vector: no power of two, which rows a page apart would be
  static constexpr int64_t natural_pitch(int64_t dim) { return 2 * round_up(dim, kMostBlock) + kLanes; }
  static constexpr int64_t o_pitch(int64_t dim_v) { return round_up(dim_v, kStretch); }

  struct Space {
    Element* q;      // [kv_heads][row_slots][q_pitch], in the order of K's columns; codes: unscaled floats
    float* natural;  // codes: [kv_heads][row_slots][natural_pitch]: q in the order of channels, and of K's
                     // columns; words: q times a power of two, its largest magnitude below 2, and that
                     // power's inverse
    float* o;        // [kv_heads][row_slots][o_pitch]
    float* offsets;  // codes: [kv_heads][row_slots][kOffsets]: sums of p * offset; group g in each i with i %
                     // padded == g
    RowState* states;
    RowPlace* places;  // [row_slots]
    float* s;          // [row_slots][kPitch]
    float* rescale;    // [row_slots]: of what was before the unit
    Unit* units;       // two
  };

  static void carve(Carver& carver, const KvCache& cache, const Plan& plan, Space& to) {
    const int64_t slots = plan.row_slots * cache.kv_heads;
    to.q = carver.take<Element>(slots * q_pitch(cache.dim));
    to.natural = carver.take<float>(K::kGrouped ? slots * natural_pitch(cache.dim) : 0);
    to.o = carver.take<float>(slots * o_pitch(cache.dim_v));
    to.offsets = carver.take<float>(V::kGrouped ? slots * kOffsets : 0);
    to.states = carver.take<RowState>(slots);
    to.places = carver.take<RowPlace>(plan.row_slots);
    to.s = carver.take<float>(plan.row_slots * kPitch);
    to.rescale = carver.take<float>(plan.row_slots);
    to.units = carver.take<Unit>(2);
  }

  Span(const DecodeArgs& call, const Plan& plan, const Space& space, bool tail)
      : call_(call), cache_(call.cache), plan_(plan), my_(space), tail_(tail) {
    q_pitch_ = q_pitch(cache_.dim);
    used_ = round_up(cache_.dim, kMostBlock);
    natural_pitch_ = natural_pitch(cache_.dim);
    o_pitch_ = o_pitch(cache_.dim_v);
    k_bytes_ = K::bytes_of(cache_.dim);
    v_bytes_ = V::bytes_of(cache_.dim_v);
    k_head_ = tail ? k_bytes_ : cache_.k.head;
    v_head_ = tail ? v_bytes_ : cache_.v.head;
    blocks_ = cache_.dim / K::kBlock;
    rest_ = cache_.dim % K::kBlock;
    if constexpr (V::kGrouped) {
      groups_ = cache_.value_groups();
      padded_ = groups_ <= 2 ? groups_ : groups_ <= 4 ? 4 : groups_ <= 8 ? 8 : kMostGroups;
    }
  }

  // Queries [query, query + queries) against keys [begin, end), all of them seen but for windows and the
  // tree. Writes [query][head][dim_v] outputs, not yet over their sums, and the states of [query][head].
  void run(int64_t sequence, int64_t query, int64_t queries, int64_t begin, int64_t end, float* out,
           RowState* states) {
    b_ = sequence;
    rows_ = queries * plan_.group;
    length_ = call_.length(sequence);
    int64_t low = begin, high = end;
    const int64_t first = query + length_ - call_.queries, last = first + queries - 1;
    if (call_.left >= 0) low = most(low, first - call_.left);
    if (call_.right >= 0) high = least(high, last + call_.right + 1);
    prepare(query);
    if (low < high) {
      locate(low, least(high, (low / kUnit + 1) * kUnit), my_.units[0]);
      for (int u = 0; my_.units[u].count; u ^= 1) {
        const int64_t next = my_.units[u].first + my_.units[u].count;
        locate(next, least(high, next + kUnit), my_.units[u ^ 1]);
        for (int64_t h = 0; h < cache_.kv_heads; ++h) walk(my_.units[u], my_.units[u ^ 1], h);
      }
    }
    finish(query, out, states);
  }

 private:
  // Rows of positions [begin, end), or none.
  void locate(int64_t begin, int64_t end, Unit& to) const {
    to.first = begin;
    to.count = most(0, end - begin);
    if (tail_) {
      const int64_t slots = 2 * cache_.group_size, size = size_of(cache_.dtype);
      for (int64_t i = 0; i < to.count; ++i) {
        const int64_t at = (b_ * slots + (begin + i) % slots) * cache_.kv_heads * size;
        to.k[i] = static_cast<const char*>(cache_.k_tail) + at * cache_.dim;
        to.v[i] = static_cast<const char*>(cache_.v_tail) + at * cache_.dim_v;
      }
      return;
    }
    for (int64_t i = 0; i < to.count;) {
      const int64_t position = begin + i, page = cache_.page_of(b_, position),
                    slot = position % cache_.page_size;
      const int64_t more = least(to.count - i, cache_.page_size - slot);
      const char* k = cache_.k.data + page * cache_.k.page + slot * cache_.k.slot;
      const char* v = cache_.v.data + page * cache_.v.page + slot * cache_.v.slot;
      for (int64_t j = 0; j < more; ++j, ++i) {
        to.k[i] = k + j * cache_.k.slot;
        to.v[i] = v + j * cache_.v.slot;
        to.row[i] = page * cache_.page_size + slot + j;
      }
    }
  }

  void walk(const Unit& now, const Unit& next, int64_t h) {
    const bool last = h + 1 == cache_.kv_heads;
    keys(now, h);
    for (int64_t r = 0; r < rows_; ++r) softmax(now, h, r);
    const Unit& after = last ? next : now;
    values(now, h, after.count ? after.k : nullptr, after.count, last ? 0 : (h + 1) * k_head_);
  }

  // decode_scores.h

  // Queries, rotated and in the order of K's columns; states and outputs as of nothing seen.
  void prepare(int64_t query);
  // q times the power of two that makes its largest magnitude 1 to 2; returns the inverse. What is not finite
  // becomes NaN.
  float normalise(float* q) const;
  // Channels in the order of K's columns: floats, or the low and the high halves of pairs.
  void reorder(const float* row, float* low, float* high) const;
  void join(const float* low, const float* high, Element* to) const;
  void keys(const Unit& now, int64_t h);
  // Offsets of codes less kMiddle.
  static void centre(const float* scale, float* offset, int64_t count);

  // What a group of K's tokens adds to each row's dots, and what multiplies sums of words.
  struct Folded {
    float bias[kTile], unit[kTile];
  };

  // Rows [r, r + rows) times K's scales and offsets.
  void fold_keys(const float* scale, const float* offset, int64_t h, int64_t r, int64_t rows, Element* q,
                 Folded& to) const;
  // s of up to kTile rows from row r on and tokens [from, from + count) of the unit.
  void dots(const Unit& now, int64_t h, int64_t r, int64_t from, int64_t count, const Element* q,
            const Folded* folded);
  template <int Rows>
  void dot(const Unit& now, int64_t h, int64_t r, int64_t from, int64_t count, const Element* q,
           const Folded* folded);
  // Row r of s from products to probabilities, 0 behind the last token.
  void softmax(const Unit& now, int64_t h, int64_t r);

  // decode_values.h

  // Scales and offsets of V, [token][padded groups], tokens behind the unit's end 0; of pairs the even
  // tokens, then the odd.
  struct ValueScales {
    alignas(64) float top[kUnit];  // words: the largest scale of each token
    alignas(64) float scale[kUnit * kMostGroups + kLanes], offset[kUnit * kMostGroups + kLanes];
  };
  void read_scales(const Unit& now, int64_t h, ValueScales& to) const;
#if BITFUSE_PAIRS
  void find_tops(ValueScales& v) const;
#endif
  // p of a row times V's scales, in the order of ValueScales: floats [token][padded], or words of pairs
  // [pair][padded], whose sums `word` multiplies.
  void fold_values(const ValueScales& v, int64_t r, int64_t count, Element* to, float* offsets,
                   float& word) const;

  struct Ahead {
    const char* const* rows;
    int64_t count, at;
  };

  void values(const Unit& now, int64_t h, const char* const* ahead, int64_t ahead_count, int64_t ahead_at);
  template <bool Uniform, class... Rest>
  void accumulate_rows(int64_t rows, const Unit& now, Rest... rest);
  // Uniform: V's channels have one group, so that what multiplies a token is one word for all.
  template <int Rows, bool Uniform>
  void accumulate(const Unit& now, int64_t h, int64_t r, const Element* p, int64_t pitch, const float* units,
                  const Ahead& next);
  // Outputs in the order of channels.
  void finish(int64_t query, float* out, RowState* states);

  const DecodeArgs& call_;
  const KvCache& cache_;
  const Plan& plan_;
  const Space& my_;
  const bool tail_;
  Reader reader_;
  int64_t q_pitch_, used_, natural_pitch_, o_pitch_, k_bytes_, v_bytes_, k_head_, v_head_, blocks_, rest_,
      groups_ = 0, padded_ = 0;
  int64_t b_ = 0, rows_ = 0, length_ = 0;
};

}  // namespace
}  // namespace bitfuse::BITFUSE_ISA
