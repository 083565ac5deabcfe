// Races, by vector clocks: two accesses of which one writes race unless a barrier, an mbarrier or an atomic
// puts one before the other. The lanes of one warp are taken to run in step.
#include <algorithm>

#include "cusim.hpp"

namespace cusim {
namespace {

[[noreturn]] void race(Warp& w, int lane, const char* space, const char* what, int other, uint64_t at,
                       int pc) {
  std::string who = [&](int actor) {
    int per_block = w.block->warp_count, first = w.actor - w.id;
    if (actor >= first && actor < first + per_block) return "warp " + std::to_string(actor - first);
    return "warp " + std::to_string(actor % per_block) + " of block " + std::to_string(actor / per_block);
  }(other);
  fault(w, lane,
        std::string("race on ") + space + " memory: " + what + " without a barrier between " + who +
            " and warp " + std::to_string(w.id) + ", " + (space[0] == 's' ? "offset " : "address ") +
            std::to_string(at) + "\n    the other: " + pc_text(*w.kernel, pc));
}
uint8_t bytes_of_word(uint64_t at, int bytes,
                      uint64_t word) {  // which of the four bytes of a word are touched
  uint64_t from = std::max(at, word * 4), to = std::min(at + bytes, word * 4 + 4);
  return uint8_t(((1 << (to - from)) - 1) << (from - word * 4));
}
void synchronise(Warp& w, Clock& c) {  // atomics and volatile accesses order the warps that make them
  merge(w.clock, c);
  merge(c, w.clock);
  tick(w);
}
bool before(const Warp& w, int actor, uint32_t clock) { return clock <= w.clock[actor]; }

// An access to a word that another warp wrote.
void check_writer(Warp& w, int lane, const Shadow& s, uint8_t mine, bool write, const char* space,
                  uint64_t at, bool excused) {
  if (s.writer < 0 || s.writer == w.actor || !(s.written & mine) || excused ||
      before(w, s.writer, s.write_clock))
    return;
  race(w, lane, space, write ? "write after write" : "read after write", s.writer, at, s.write_pc);
}
void record_write(Warp& w, Shadow& s, uint8_t mine) {
  bool again = s.writer == w.actor && s.write_clock == w.clock[w.actor];
  s.written = again ? s.written | mine : mine;
  s.writer = w.actor;
  s.same = 0;
  s.read = 0;
  s.write_clock = w.clock[w.actor];
  s.write_pc = w.cur;
}

}  // namespace

void check_shared(Warp& w, int lane, size_t at, int bytes, Access access) {
  Block& b = *w.block;
  int n = b.warp_count, first = w.actor - w.id;
  for (size_t word = at / 4; word <= (at + bytes - 1) / 4; ++word) {
    Shadow& s = b.shadow[word];
    uint32_t* read_clock = &b.read_clock[word * n];
    uint8_t mine = bytes_of_word(at, bytes, word);
    if (access == Access::Sync) {
      synchronise(w, b.sync_clock[uint32_t(word)]);
      continue;
    }
    if (access == Access::Arrive) {
      if (s.pending) --s.pending;
      record_write(w, s, mine);
      s.generic = false;
      continue;
    }
    bool write = access == Access::Write || access == Access::Issue;
    check_writer(w, lane, s, mine, write, "shared", word * 4, w.id < 64 && (s.same >> w.id & 1));
    if (s.pending && (s.written & mine))
      fault(w, lane,
            std::string(write ? "write to" : "read of") +
                " shared memory that an asynchronous copy has yet to fill, offset " +
                std::to_string(word * 4) + "\n    the copy: " + pc_text(*w.kernel, s.write_pc));
    if (write) {
      for (int r = 0; r < n && (s.read & mine); ++r)
        if (r != w.id && !before(w, first + r, read_clock[r]))
          race(w, lane, "shared", "write after read", first + r, word * 4, s.read_pc);
      record_write(w, s, mine);
      std::fill(read_clock, read_clock + n, 0);
      s.generic = access == Access::Write;
      s.proxy_time = b.proxy_time;
      if (access == Access::Issue) ++s.pending;
      continue;
    }
    if (access == Access::AsyncRead && s.generic && s.writer >= 0 && (s.written & mine) &&
        b.warps[s.writer - first]->proxy_fence <= s.proxy_time && w.proxy_fence <= s.proxy_time)
      fault(w, lane,
            "wgmma or a bulk copy reads shared memory that st wrote, without fence.proxy.async in between, "
            "offset " +
                std::to_string(word * 4) + "\n    the store: " + pc_text(*w.kernel, s.write_pc));
    read_clock[w.id] = w.clock[w.actor];
    s.read |= mine;
    s.read_pc = w.cur;
  }
}
bool same_shared(Warp& w, size_t at, int n) {
  for (size_t word = at / 4; word <= (at + n - 1) / 4; ++word) {
    Shadow& s = w.block->shadow[word];
    if (s.writer < 0 || s.pending || w.id >= 64) return false;
    s.same |= 1ull << w.id;
  }
  return true;
}

void check_global(Warp& w, int lane, uint64_t at, int bytes, Access access) {
  Launch& launch = *w.block->launch;
  constexpr size_t kReaders = 8;  // a word that more have read since its last write keeps the latest
  for (uint64_t word = at / 4; word <= (at + bytes - 1) / 4; ++word) {
    if (access == Access::Sync) {
      synchronise(w, launch.global_sync[word]);
      continue;
    }
    GlobalShadow& s = launch.global[word];
    uint8_t mine = bytes_of_word(at, bytes, word);
    bool write = access == Access::Write;
    bool excused = std::find(s.same_writers.begin(), s.same_writers.end(), w.actor) != s.same_writers.end();
    check_writer(w, lane, s, mine, write, "global", word * 4, excused);
    if (write) {
      if (s.read & mine)
        for (auto& [actor, clock] : s.readers)
          if (actor != w.actor && !before(w, actor, clock))
            race(w, lane, "global", "write after read", actor, word * 4, s.read_pc);
      record_write(w, s, mine);
      s.readers.clear();
      s.same_writers.clear();
      continue;
    }
    s.read |= mine;
    s.read_pc = w.cur;
    auto it = std::find_if(s.readers.begin(), s.readers.end(), [&](auto& r) { return r.first == w.actor; });
    if (it != s.readers.end()) {
      it->second = w.clock[w.actor];
    } else {
      if (s.readers.size() == kReaders) s.readers.erase(s.readers.begin());
      s.readers.push_back({w.actor, w.clock[w.actor]});
    }
  }
}
bool same_global(Warp& w, uint64_t at, int n) {
  auto& global = w.block->launch->global;
  for (uint64_t word = at / 4; word <= (at + n - 1) / 4; ++word) {
    auto it = global.find(word);
    if (it == global.end() || it->second.writer < 0) return false;
    it->second.same_writers.push_back(w.actor);
  }
  return true;
}

}  // namespace cusim
