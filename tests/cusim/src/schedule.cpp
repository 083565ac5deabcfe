// Who runs next: the lanes of a warp, the warps of a block, and the barriers between them.
#include <algorithm>

#include "instruction.hpp"

namespace cusim {

void merge(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t k = 0; k < from.size(); ++k) into[k] = std::max(into[k], from[k]);
}

// ---- barriers ----
static void advance(Warp& w, uint32_t mask) {  // the lanes of the mask, past their instruction
  if (w.together) {
    ++w.pc[0];
    return;
  }
  for (int l : lanes_of(mask)) ++w.pc[l];
}
static void release(Barrier& bar) {
  for (auto& [w, mask] : bar.waiting) {
    merge(w->clock, bar.clock);
    w->blocked &= ~mask;
    advance(*w, mask);
  }
  for (auto& [w, i] : bar.reds) {
    uint64_t v = i->aux == 2 ? bar.votes : i->aux == 3 ? bar.all : bar.any;
    Lanes d = w->row(i->ops[0]);
    for (int l : lanes_of(w->live)) d[l] = v;
  }
  for (auto& [w, mask] : bar.waiting) tick(*w);
  bar = Barrier();
}
static int live_threads(const Block& b) {
  int n = 0;
  for (auto& w : b.warps) n += std::popcount(w->live);
  return n;
}
// aux: 0 sync, 1 arrive, else a reduction: 2 popc, 3 and, 4 or. ops: [result,] barrier [, threads] [,
// predicate]
static void at_barrier(Warp& w, const Instr& i, uint32_t mask) {
  Block& b = *w.block;
  bool red = i.aux >= 2;
  size_t first = red ? 1 : 0, counted = first + 1;
  int lane = std::countr_zero(mask);
  uint64_t id = i.ops.empty() ? 0 : w.row(i.ops[first])[lane];
  if (id > 15) fault(w, lane, "barrier " + std::to_string(id) + " does not exist");
  Barrier& bar = b.barriers[id];
  uint32_t expected = i.ops.size() > counted + red ? (uint32_t)w.row(i.ops[counted])[lane] : 0;
  if (expected % 32) fault(w, lane, "barrier thread count is not a multiple of the warp size");
  if (bar.arrived && bar.expected != expected)
    fault(w, lane, "threads disagree on the count of barrier " + std::to_string(id));
  bar.expected = expected;
  bar.arrived += std::popcount(mask);
  ++b.launch->effects;
  merge(bar.clock, w.clock);
  if (red)
    for (int l : lanes_of(mask)) {
      bool t = truth(w, i.ops.back(), l);
      bar.votes += t;
      bar.any |= t;
      bar.all &= t;
    }
  if (i.aux == 1) {
    advance(w, mask);
    tick(w);
  } else {
    bar.waiting.push_back({&w, mask});
    w.blocked |= mask;
    if (red) bar.reds.push_back({&w, &i});
  }
  uint32_t need = expected ? expected : live_threads(b);
  if (bar.arrived >= need) release(bar);
}

// ---- registers that a wgmma has yet to write ----
static void check_in_flight(Warp& w, const Instr& i) {
  auto group = [&](const Operand& o) {
    uint32_t g = o.kind == Operand::Reg ? w.in_flight[o.index] : 0;
    return g > w.wgmma_done ? g : 0;
  };
  uint32_t latest = 0;
  for (size_t k = i.destinations; k < i.ops.size(); ++k) latest = std::max(latest, group(i.ops[k]));
  if (latest && !i.moves)
    fault(w, std::countr_zero(w.live), "a register of a wgmma is read before wgmma.wait_group");
  if (i.accumulates) return;
  for (int k = 0; k < i.destinations; ++k)
    if (i.ops[k].kind == Operand::Reg) w.in_flight[i.ops[k].index] = latest;
}

// ---- one warp ----
namespace {
struct Group {
  int pc;
  uint32_t lanes;  // none when no lane may go
};
}  // namespace
static bool collective_ready(const Warp& w, const Instr& i, uint32_t lanes) {
  if (i.flow != Flow::Collective) return true;
  uint32_t want = w.live;
  if (i.member.kind != Operand::None) want &= uint32_t(w.row(i.member)[std::countr_zero(lanes)]);
  return (lanes & want) == want;
}
// The lanes with the lowest pc go first, so that diverged lanes meet again.
static Group next_group(const Warp& w, uint32_t ready) {
  if (w.together) {
    int pc = w.pc[0];
    return {pc, collective_ready(w, w.kernel->code[pc], ready) ? ready : 0};
  }
  for (uint32_t left = ready; left;) {
    int pc = w.pc[std::countr_zero(left)];
    for (int l : lanes_of(left)) pc = std::min(pc, w.pc[l]);
    uint32_t group = 0;
    for (int l : lanes_of(left)) group |= uint32_t(w.pc[l] == pc) << l;
    if (collective_ready(w, w.kernel->code[pc], group)) return {pc, group};
    left &= ~group;
  }
  return {0, 0};
}
static void set_pc(Warp& w, uint32_t lanes, int pc) {
  if (lanes == w.live) {  // all of them: together from now on
    w.together = true;
    w.pc[0] = pc;
    return;
  }
  if (w.together) {
    std::fill(w.pc, w.pc + kLanes, w.pc[0]);
    w.together = false;
  }
  for (int l : lanes_of(lanes)) w.pc[l] = pc;
}
static void reunite(Warp& w) {  // after an exit or a step of a diverged warp
  if (w.together || w.blocked || !w.live) return;
  int pc = w.pc[std::countr_zero(w.live)];
  for (int l : lanes_of(w.live))
    if (w.pc[l] != pc) return;
  w.together = true;
  w.pc[0] = pc;
}
static uint32_t guarded(const Warp& w, const Instr& i, uint32_t group) {
  if (i.guard.kind == Operand::None) return group;
  const uint64_t* p = w.row(i.guard);
  uint32_t set = 0;
  for (int l = 0; l < kLanes; ++l) set |= uint32_t(p[l] & 1) << l;
  return group & (i.guard.negate ? ~set : set);
}
static void branch_table(Warp& w, const Instr& i, uint32_t act, uint32_t group, int pc) {
  const uint64_t* t = w.row(i.ops[0]);
  set_pc(w, group, pc + 1);
  for (int l : lanes_of(act)) {
    if (t[l] >= i.table.size()) fault(w, l, "brx.idx out of range");
    set_pc(w, 1u << l, i.table[t[l]]);
  }
}

// Returns false when no lane can move.
bool step_warp(Warp& w, int quantum) {
  const Instr* code = w.kernel->code.data();
  uint64_t& instructions = w.block->launch->stats.instructions;
  bool moved = false;
  w.block->launch->stepping = &w;
  while (quantum-- > 0) {
    uint32_t ready = w.live & ~w.blocked;
    if (!ready) return moved;
    auto [pc, group] = next_group(w, ready);
    if (!group) return moved;
    const Instr& i = code[pc];
    w.cur = pc;
    ++w.steps;
    ++instructions;
    moved = true;
    uint32_t act = guarded(w, i, group), rest = group & ~act;
    if (w.wgmma_any && act) check_in_flight(w, i);
    switch (i.flow) {
      case Flow::Next:
      case Flow::Collective:
        if (act) i.fn(w, i, act);
        set_pc(w, group, pc + 1);
        break;
      case Flow::Branch:
        if (rest) set_pc(w, rest, pc + 1);
        if (act) set_pc(w, act, int(i.imm));
        if (act && i.imm <= pc && w.spinning) {
          w.spinning = false;
          reunite(w);
          return true;
        }
        break;
      case Flow::BranchTable:
        branch_table(w, i, act, group, pc);
        break;
      case Flow::Exit:
        if (rest) set_pc(w, rest, pc + 1);
        w.live &= ~act;
        if (!act) break;
        ++w.block->launch->effects;
        reunite(w);
        return true;
      case Flow::Barrier:
        if (rest) set_pc(w, rest, pc + 1);
        if (!act) break;
        at_barrier(w, i, act);
        return true;
    }
    reunite(w);
  }
  return moved;
}

// ---- one block ----
bool Block::done() const {
  return std::none_of(warps.begin(), warps.end(), [](auto& w) { return w->live; });
}
static unsigned random(Block& b) {
  b.rng = b.rng * 1664525u + 1013904223u;
  return b.rng >> 8;
}
bool Block::run(int quantum) {
  bool moved = false, shuffled = launch->settings.seed;
  std::vector<Warp*> order;
  for (auto& w : warps)
    if (w->live) order.push_back(w.get());
  if (shuffled)
    for (size_t k = order.size(); k > 1; --k) std::swap(order[k - 1], order[random(*this) % k]);
  for (Warp* w : order) moved |= step_warp(*w, shuffled ? 1 + int(random(*this) % quantum) : quantum);
  // exits may have completed a barrier that counts the live threads
  for (Barrier& bar : barriers)
    if (bar.arrived && !bar.expected && (int)bar.arrived >= live_threads(*this)) {
      release(bar);
      moved = true;
    }
  return moved;
}

}  // namespace cusim
