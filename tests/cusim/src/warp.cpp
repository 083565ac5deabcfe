// What the lanes of a warp do together, and the barriers between warps.
#include <algorithm>

#include "instruction.hpp"

namespace cusim {
namespace {

enum Shuffle { Up, Down, Butterfly, Index };
const char* const kShuffle[] = {"up", "down", "bfly", "idx"};
void shfl(Warp& w, const Instr& i, uint32_t m) {  // ops: d[|p], a, b, c
  int s = i.destinations;
  Lanes d = dst(w, i.ops[0]), p = s == 2 ? dst(w, i.ops[1]) : nullptr;
  const uint64_t *b = w.row(i.ops[s + 1]), *c = w.row(i.ops[s + 2]);
  uint64_t v[kLanes], source[kLanes];
  bool inside[kLanes];
  memcpy(v, w.row(i.ops[s]), sizeof v);
  for (int l : lanes_of(m)) {
    int by = b[l] & 31, clamp = c[l] & 31, segment = c[l] >> 8 & 31;
    int most = (l & segment) | (clamp & ~segment), least = l & segment, j;
    switch (i.aux) {
      case Up:
        j = l - by, inside[l] = j >= most;
        break;
      case Down:
        j = l + by, inside[l] = j <= most;
        break;
      case Butterfly:
        j = l ^ by, inside[l] = j <= most;
        break;
      default:
        j = least | (by & ~segment), inside[l] = j <= most;
    }
    if (!inside[l]) j = l;
    if (!(m >> j & 1))
      fault(w, l, "shfl.sync reads lane " + std::to_string(j) + ", which does not take part");
    source[l] = uint32_t(v[j]);
  }
  for (int l : lanes_of(m)) {
    d[l] = source[l];
    if (p) p[l] = inside[l];
  }
}
enum Vote { All, Any, Uniform, Ballot };
const char* const kVote[] = {"all", "any", "uni", "ballot"};
void vote(Warp& w, const Instr& i, uint32_t m) {
  uint32_t set = 0;
  for (int l : lanes_of(m)) set |= uint32_t(truth(w, i.ops[1], l)) << l;
  uint32_t r = i.aux == All       ? set == m
               : i.aux == Any     ? set != 0
               : i.aux == Uniform ? set == m || set == 0
                                  : set;
  Lanes d = dst(w, i.ops[0]);
  for (int l : lanes_of(m)) d[l] = r;
}
template <class T>
void match_any(Warp& w, const Instr& i, uint32_t m) {
  uint64_t v[kLanes];
  memcpy(v, w.row(i.ops[1]), sizeof v);
  Lanes d = dst(w, i.ops[0]);
  for (int l : lanes_of(m)) {
    uint32_t r = 0;
    for (int k : lanes_of(m)) r |= uint32_t(T(v[k]) == T(v[l])) << k;
    d[l] = r;
  }
}
template <class T>
void match_all(Warp& w, const Instr& i, uint32_t m) {
  const uint64_t* a = w.row(i.ops[i.destinations]);
  bool same = true;
  int first = std::countr_zero(m);
  for (int l : lanes_of(m)) same &= T(a[l]) == T(a[first]);
  Lanes d = dst(w, i.ops[0]), p = i.destinations == 2 ? dst(w, i.ops[1]) : nullptr;
  for (int l : lanes_of(m)) {
    d[l] = same ? m : 0;
    if (p) p[l] = same;
  }
}
const char* const kRedux[] = {"add", "min", "max", "and", "or", "xor"};
template <class T>
void redux(Warp& w, const Instr& i, uint32_t m) {
  const uint64_t* a = w.row(i.ops[1]);
  int first = std::countr_zero(m);
  T r = T(a[first]);
  for (int l : lanes_of(m & (m - 1))) {
    T v = T(a[l]);
    switch (i.aux) {
      case 0:
        r = T(uint32_t(r) + uint32_t(v));
        break;
      case 1:
        r = std::min(r, v);
        break;
      case 2:
        r = std::max(r, v);
        break;
      case 3:
        r &= v;
        break;
      case 4:
        r |= v;
        break;
      default:
        r ^= v;
    }
  }
  Lanes d = dst(w, i.ops[0]);
  for (int l : lanes_of(m)) wr<uint32_t>(d, l, uint32_t(r));
}
void elect(Warp& w, const Instr& i, uint32_t m) {
  Lanes d = dst(w, i.ops[0]), p = dst(w, i.ops[1]);
  int lead = std::countr_zero(m);
  for (int l : lanes_of(m)) {
    d[l] = lead;
    p[l] = l == lead;
  }
}
void activemask(Warp& w, const Instr& i, uint32_t m) {
  Lanes d = dst(w, i.ops[0]);
  for (int l : lanes_of(m)) d[l] = m;
}
void yield(Warp& w, const Instr&, uint32_t) { w.spinning = true; }

void decode_bar(Instr& i, const Opcode& o) {
  i.fn = nop;
  i.destinations = 0;
  if (o.has("warp")) return collective(i, true);
  if (o.has("cluster")) unsupported(o);
  i.flow = Flow::Barrier;
  i.aux = o.has("arrive") ? 1 : !o.has("red") ? 0 : o.has("popc") ? 2 : o.has("and") ? 3 : 4;
  if (i.aux >= 2) i.destinations = 1;
}

}  // namespace

void add_warp(DecoderTable& t) {
  t["shfl"] = [](Instr& i, const Opcode& o) {
    if (!o.has("sync")) unsupported(o);
    collective(i, true);
    i.fn = shfl;
    i.aux = which(o, kShuffle);
  };
  t["vote"] = [](Instr& i, const Opcode& o) {
    if (!o.has("sync")) unsupported(o);
    collective(i, true);
    i.fn = vote;
    i.aux = which(o, kVote);
  };
  t["match"] = [](Instr& i, const Opcode& o) {
    collective(i, true);
    bool wide = o.type() == "b64";
    i.fn = o.has("all") ? (wide ? match_all<uint64_t> : match_all<uint32_t>)
                        : (wide ? match_any<uint64_t> : match_any<uint32_t>);
  };
  t["redux"] = [](Instr& i, const Opcode& o) {
    if (o.type() == "f32") unsupported(o);
    collective(i, true);
    i.fn = o.type() == "s32" ? redux<int32_t> : redux<uint32_t>;
    i.aux = which(o, kRedux);
  };
  t["elect"] = [](Instr& i, const Opcode&) {
    collective(i, true);
    i.fn = elect;
  };
  t["activemask"] = [](Instr& i, const Opcode&) { i.fn = activemask; };
  t["nanosleep"] = [](Instr& i, const Opcode&) {
    i.fn = yield;
    i.destinations = 0;
  };
  t["bar"] = t["barrier"] = decode_bar;
}

}  // namespace cusim
