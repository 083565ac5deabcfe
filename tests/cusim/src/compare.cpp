// Comparisons, selections and moves.
#include "instruction.hpp"

namespace cusim {
namespace {

enum Cmp { eq, ne, lt, le, gt, ge, lo, ls, hi, hs, equ, neu, ltu, leu, gtu, geu, num, nan_ };
const char* const kCmp[] = {"eq", "ne",  "lt",  "le",  "gt",  "ge",  "lo",  "ls",  "hi",
                            "hs", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};
enum Combine { None, And, Or, Xor };

template <class T>
bool compare(int c, T x, T y) {
  bool unordered = x != x || y != y;
  switch (c) {
    case eq:
      return x == y;
    case ne:
      return !unordered && x != y;
    case lt:
    case lo:
      return x < y;
    case le:
    case ls:
      return x <= y;
    case gt:
    case hi:
      return x > y;
    case ge:
    case hs:
      return x >= y;
    case equ:
      return unordered || x == y;
    case neu:
      return unordered || x != y;
    case ltu:
      return unordered || x < y;
    case leu:
      return unordered || x <= y;
    case gtu:
      return unordered || x > y;
    case geu:
      return unordered || x >= y;
    case num:
      return !unordered;
    default:
      return unordered;
  }
}
template <class T>
auto plain(T v) {
  if constexpr (std::is_arithmetic_v<T>)
    return v;
  else
    return up(v);
}
bool combine(int how, bool r, bool c) {
  return how == And ? r & c : how == Or ? r | c : how == Xor ? r ^ c : r;
}

// aux: comparison | combination << 8; with two destinations the second takes the opposite
template <class T>
void setp(Warp& w, const Instr& i, uint32_t m) {
  int first = i.destinations, how = int(i.aux >> 8), cmp = int(i.aux & 255);
  Lanes d = dst(w, i.ops[0]), q = first == 2 ? dst(w, i.ops[1]) : nullptr;
  const uint64_t *a = w.row(i.ops[first]), *b = w.row(i.ops[first + 1]);
  each_lane(m, [&](int l) {
    bool r = compare(cmp, plain(rd<T>(a, l)), plain(rd<T>(b, l)));
    bool c = how && truth(w, i.ops[first + 2], l);
    d[l] = combine(how, r, c);
    if (q) q[l] = combine(how, !r, c);
  });
}
template <class T2>
void setp_pair(Warp& w, const Instr& i, uint32_t m) {  // p|q compare the two halves
  using H = typename half_of<T2>::type;
  int how = int(i.aux >> 8), cmp = int(i.aux & 255);
  Lanes d = dst(w, i.ops[0]), q = dst(w, i.ops[1]);
  const uint64_t *a = w.row(i.ops[2]), *b = w.row(i.ops[3]);
  each_lane(m, [&](int l) {
    T2 x = rd<T2>(a, l), y = rd<T2>(b, l);
    bool c = how && truth(w, i.ops[4], l);
    bool low = compare(cmp, up(H{x.b[0]}), up(H{y.b[0]})), high = compare(cmp, up(H{x.b[1]}), up(H{y.b[1]}));
    d[l] = combine(how, low, c);
    q[l] = combine(how, high, c);
  });
}
int comparison(const Opcode& o) {
  for (int k = 0; k <= nan_; ++k)
    if (o.mods[0] == kCmp[k]) return k;
  unsupported(o);
}
Combine combination(const Opcode& o) {
  return o.has("and") ? And : o.has("or") ? Or : o.has("xor") ? Xor : None;
}
void decode_setp(Instr& i, const Opcode& o) {
  std::string t = o.type();
  i.aux = comparison(o) | combination(o) << 8;
  i.fn = for_integer(t, []<class T>() -> Execute { return setp<T>; });
  if (!i.fn) i.fn = for_float(t, []<class T>() -> Execute { return setp<T>; });
  if (!i.fn) i.fn = for_pair(t, []<class T>() -> Execute { return setp_pair<T>; });
  required(i.fn, o);
}

// set: aux: comparison | combination << 8; aux2: what is written for true
template <class T>
void set(Warp& w, const Instr& i, uint32_t m) {
  Lanes d = dst(w, i.ops[0]);
  const uint64_t *a = w.row(i.ops[1]), *b = w.row(i.ops[2]);
  int how = int(i.aux >> 8), cmp = int(i.aux & 255);
  for (int l : lanes_of(m)) {
    bool c = how && truth(w, i.ops[3], l);
    T x = rd<T>(a, l), y = rd<T>(b, l);
    if constexpr (is_pair<T>) {
      using H = typename half_of<T>::type;
      uint64_t r = 0;
      for (int k = 0; k < 2; ++k)
        if (combine(how, compare(cmp, up(H{x.b[k]}), up(H{y.b[k]})), c)) r |= uint64_t(i.aux2) << (16 * k);
      d[l] = r;
    } else {
      d[l] = combine(how, compare(cmp, plain(x), plain(y)), c) ? uint64_t(i.aux2) : 0;
    }
  }
}
void decode_set(Instr& i, const Opcode& o) {
  if (o.mods.size() < 3) unsupported(o);
  std::string from = o.type(), to = o.mods[o.mods.size() - 2];
  i.aux = comparison(o) | combination(o) << 8;
  bool pair = from == "f16x2" || from == "bf16x2";
  i.aux2 = to == "f32"                          ? 0x3f800000
           : to == "f16" || to == "f16x2"       ? 0x3c00
           : to == "bf16" || to == "bf16x2"     ? 0x3f80
           : pair || to == "u16" || to == "s16" ? 0xffff
                                                : 0xffffffffll;
  i.fn = for_integer(from, []<class T>() -> Execute { return set<T>; });
  if (!i.fn) i.fn = for_float(from, []<class T>() -> Execute { return set<T>; });
  if (!i.fn) i.fn = for_pair(from, []<class T>() -> Execute { return set<T>; });
  required(i.fn, o);
}

void selp(Warp& w, const Instr& i, uint32_t m) {
  Lanes d = dst(w, i.ops[0]);
  const uint64_t *a = w.row(i.ops[1]), *b = w.row(i.ops[2]);
  const Operand& p = i.ops[3];
  each_lane(m, [&](int l) { d[l] = truth(w, p, l) ? a[l] : b[l]; });
}
template <class T>
void slct(Warp& w, const Instr& i, uint32_t m) {
  Lanes d = dst(w, i.ops[0]);
  const uint64_t *a = w.row(i.ops[1]), *b = w.row(i.ops[2]), *c = w.row(i.ops[3]);
  each_lane(m, [&](int l) { d[l] = rd<T>(c, l) >= 0 ? a[l] : b[l]; });
}

// ---- moves ----
void mov(Warp& w, const Instr& i, uint32_t m) {
  Lanes d = dst(w, i.ops[0]);
  const uint64_t* a = w.row(i.ops[1]);
  each_lane(m, [&](int l) { d[l] = a[l]; });
}
void mov_pred(Warp& w, const Instr& i, uint32_t m) {
  Lanes d = dst(w, i.ops[0]);
  each_lane(m, [&](int l) { d[l] = truth(w, i.ops[1], l); });
}
uint64_t low_bits(int64_t n) { return (1ull << n) - 1; }
void mov_pack(Warp& w, const Instr& i, uint32_t m) {  // d = {a, b, ...}: aux = bits of a part
  uint64_t out[kLanes] = {};
  for (size_t k = 1; k < i.ops.size(); ++k) {
    const uint64_t* a = w.row(i.ops[k]);
    each_lane(m, [&](int l) { out[l] |= (a[l] & low_bits(i.aux)) << ((k - 1) * i.aux); });
  }
  Lanes d = dst(w, i.ops[0]);
  each_lane(m, [&](int l) { d[l] = out[l]; });
}
void mov_unpack(Warp& w, const Instr& i, uint32_t m) {  // {a, b, ...} = d
  uint64_t v[kLanes];
  memcpy(v, w.row(i.ops.back()), sizeof v);
  for (size_t k = 0; k + 1 < i.ops.size(); ++k) {
    Lanes d = dst(w, i.ops[k]);
    each_lane(m, [&](int l) { d[l] = v[l] >> (k * i.aux) & low_bits(i.aux); });
  }
}
void mov_any(Warp& w, const Instr& i, uint32_t m) {  // what it is shows when the operands are known
  if (i.ops.size() == 2) return mov(w, i, m);
  i.destinations > 1 ? mov_unpack(w, i, m) : mov_pack(w, i, m);
}
void clock(Warp& w, const Instr& i, uint32_t m) {
  Lanes d = dst(w, i.ops[0]);
  each_lane(m, [&](int l) { d[l] = w.steps; });
}
void decode_mov(Instr& i, const Opcode& o) {
  i.bytes = uint8_t(type_bytes(o.type()));
  i.fn = o.type() == "pred" ? mov_pred : mov_any;
  i.moves = true;
}

// ---- generic addresses ----
uint64_t tag_of(Space s) { return s == Space::Shared ? kSharedTag : s == Space::Local ? kLocalTag : 0; }
template <bool to>
void cvta(Warp& w, const Instr& i, uint32_t m) {
  uint64_t base = i.space == Space::Param ? (uint64_t)w.block->launch->params.data() : 0;
  uint64_t tag = tag_of(i.space);
  unary<uint64_t>(w, i, m, [=](uint64_t a) { return to ? (a - base) & ~tag : (a + base) | tag; });
}
void decode_cvta(Instr& i, const Opcode& o) {
  i.space = space_of(o);
  i.fn = o.has("to") ? cvta<true> : cvta<false>;
}
void isspacep(Warp& w, const Instr& i, uint32_t m) {
  uint64_t tag = tag_of(i.space);
  unary<uint64_t>(w, i, m, [=](uint64_t a) -> uint64_t {
    return tag ? (a & tag) != 0 : (a & (kSharedTag | kLocalTag)) == 0;
  });
}

}  // namespace

void add_compare(DecoderTable& t) {
  t["setp"] = decode_setp;
  t["set"] = decode_set;
  t["selp"] = [](Instr& i, const Opcode&) { i.fn = selp; };
  t["slct"] = [](Instr& i, const Opcode& o) { i.fn = o.type() == "f32" ? slct<float> : slct<int32_t>; };
  t["mov"] = decode_mov;
  t["clock"] = [](Instr& i, const Opcode&) { i.fn = clock; };
  t["cvta"] = decode_cvta;
  t["isspacep"] = [](Instr& i, const Opcode& o) {
    i.space = space_of(o);
    i.fn = isspacep;
  };
}

}  // namespace cusim
