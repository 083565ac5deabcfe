// mbarriers: arrivals, transaction counts and waits. Their state is beside the block, not in its memory.
#include "instruction.hpp"

namespace cusim {

MBarrier& mbarrier_at(Warp& w, int lane, uint64_t address) {
  auto& bars = w.block->mbarriers;
  auto it = bars.find(uint32_t(address & ~kSharedTag));
  if (it == bars.end()) fault(w, lane, "mbarrier used before mbarrier.init");
  return it->second;
}
void settle(Warp& w, MBarrier& b) {
  ++w.block->launch->effects;
  if (b.pending || b.tx) return;
  ++b.phase;
  b.pending = b.expected;
}

namespace {

void init(Warp& w, const Instr& i, uint32_t m) {
  const uint64_t *a = w.row(i.ops[0]), *n = w.row(i.ops[1]);
  for (int l : lanes_of(m)) {
    uint32_t at = uint32_t((a[l] + i.imm) & ~kSharedTag);
    if (at % 8) fault(w, l, "misaligned mbarrier");
    shared_at(w, l, at, 8, Access::Sync);
    MBarrier b;
    b.expected = b.pending = uint32_t(n[l]);
    w.block->mbarriers[at] = b;
  }
}
void invalidate(Warp& w, const Instr& i, uint32_t m) {
  const uint64_t* a = w.row(i.ops[0]);
  for (int l : lanes_of(m)) w.block->mbarriers.erase(uint32_t((a[l] + i.imm) & ~kSharedTag));
}
enum Kind { Arrive, ArriveExpect, Expect, Complete, Drop };
void arrive(Warp& w, const Instr& i, uint32_t m) {  // aux: Kind; ops: [state,] address [, count]
  int first = i.destinations;
  const uint64_t* a = w.row(i.ops[first]);
  for (int l : lanes_of(m)) {
    MBarrier& b = mbarrier_at(w, l, a[l] + i.imm);
    int64_t count = i.ops.size() > size_t(first + 1) ? uint32_t(w.row(i.ops[first + 1])[l]) : 1;
    if (first) dst(w, i.ops[0])[l] = b.phase;
    merge(b.clock, w.clock);
    switch (i.aux) {
      case Arrive:
        b.pending -= count;
        break;
      case ArriveExpect:
        b.tx += count, b.pending -= 1;
        break;
      case Expect:
        b.tx += count;
        continue;
      case Complete:
        b.tx -= count;
        break;
      case Drop:
        b.pending -= count, b.expected -= count;
        break;
    }
    if (b.pending < 0) fault(w, l, "more arrivals at an mbarrier than it expects");
    settle(w, b);
  }
  tick(w);
}
// aux: 1 by parity; ops: p, address, state or parity [, time hint]
void wait(Warp& w, const Instr& i, uint32_t m) {
  Lanes p = dst(w, i.ops[0]);
  const uint64_t *a = w.row(i.ops[1]), *s = w.row(i.ops[2]);
  for (int l : lanes_of(m)) {
    MBarrier& b = mbarrier_at(w, l, a[l] + i.imm);
    while (!b.copies.empty()) {
      auto copies = std::move(b.copies);
      b.copies.clear();
      for (auto& bring : copies) bring(w, l);
    }
    bool done = i.aux ? (b.phase & 1) != (s[l] & 1) : b.phase > s[l];
    p[l] = done;
    if (done)
      merge(w.clock, b.clock);
    else
      w.spinning = true;
  }
}
// The arrival comes when all earlier cp.async of the lane have; they are brought by the next wait here.
void arrive_after_copies(Warp& w, const Instr& i, uint32_t m) {  // aux: noinc
  const uint64_t* a = w.row(i.ops[0]);
  for (int l : lanes_of(m)) {
    uint64_t at = a[l] + i.imm;
    MBarrier& b = mbarrier_at(w, l, at);
    merge(b.clock, w.clock);
    if (!i.aux) ++b.pending;
    uint32_t groups = ++w.committed[l];
    Warp* owner = &w;
    b.copies.push_back([=](Warp& waiter, int lane) {
      uint32_t limit[kLanes] = {};
      limit[l] = groups;
      finish_copies(*owner, limit);
      MBarrier& bar = mbarrier_at(waiter, lane, at);
      merge(bar.clock, owner->clock);
      if (--bar.pending < 0) fault(waiter, lane, "more arrivals at an mbarrier than it expects");
      settle(waiter, bar);
      tick(*owner);
    });
  }
  tick(w);
}
void decode_mbarrier(Instr& i, const Opcode& o) {
  i.destinations = 0;
  if (o.has("init")) {
    i.fn = init;
  } else if (o.has("inval")) {
    i.fn = invalidate;
  } else if (o.has("test_wait") || o.has("try_wait")) {
    i.fn = wait;
    i.aux = o.has("parity");
    i.destinations = 1;
  } else if (o.has("arrive") || o.has("arrive_drop")) {
    i.fn = arrive;
    i.aux = o.has("arrive_drop") ? Drop : o.has("expect_tx") ? ArriveExpect : Arrive;
    i.destinations = 1;
  } else if (o.has("expect_tx") || o.has("complete_tx")) {
    i.fn = arrive;
    i.aux = o.has("expect_tx") ? Expect : Complete;
  } else {
    unsupported(o);
  }
}

}  // namespace

void decode_cp_async_mbarrier(Instr& i, const Opcode& o) {
  i.fn = arrive_after_copies;
  i.aux = o.has("noinc");
}
void add_mbarrier(DecoderTable& t) { t["mbarrier"] = decode_mbarrier; }

}  // namespace cusim
