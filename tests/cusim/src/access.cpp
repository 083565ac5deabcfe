// Where an access lands, whether it may, and what it costs.
#include <algorithm>
#include <sstream>

#include "cusim.hpp"

namespace cusim {

char* shared_at(Warp& w, int lane, uint64_t offset, int bytes, Access access) {
  Block& b = *w.block;
  bool write = access != Access::Read && access != Access::AsyncRead;
  if (offset < kSharedBase || offset + bytes > kSharedBase + b.shared.size()) [[unlikely]] {
    std::ostringstream o;
    o << "shared memory " << (write ? "write" : "read") << " out of bounds: offset "
      << (int64_t)offset - (int64_t)kSharedBase << ", " << bytes << " bytes, of " << b.shared.size();
    fault(w, lane, o.str());
  }
  size_t at = offset - kSharedBase;
  if (write && access != Access::Sync) ++b.launch->effects;
  if (b.launch->settings.racecheck) check_shared(w, lane, at, bytes, access);
  return b.shared.data() + at;
}
char* global_at(Warp& w, int lane, uint64_t a, int bytes, Access access) {
  if (a < 4096) [[unlikely]]
    fault(w, lane, std::string("null pointer ") + (access == Access::Write ? "write" : "read"));
  if (w.block->launch->settings.racecheck >= 2) check_global(w, lane, a, bytes, access);
  return (char*)a;
}
static bool is_shared(const Instr& i, uint64_t a) {
  return i.space == Space::Shared || (i.space == Space::Generic && (a & kSharedTag));
}
static bool is_local(const Instr& i, uint64_t a) {
  return i.space == Space::Local || (i.space == Space::Generic && (a & kLocalTag));
}
char* memory_at(Warp& w, const Instr& i, int lane, uint64_t a, int bytes, Access access) {
  if (bytes > 1 && a % bytes && bytes <= 32) [[unlikely]] {
    std::ostringstream o;
    o << "misaligned " << bytes << "-byte access at 0x" << std::hex << a;
    fault(w, lane, o.str());
  }
  if (i.space == Space::Param) return w.block->launch->params.data() + a;
  if (is_shared(i, a)) return shared_at(w, lane, a & ~kSharedTag, bytes, access);
  if (is_local(i, a)) {
    uint64_t off = a & ~kLocalTag;
    if (off + bytes > w.kernel->local_bytes) fault(w, lane, "local memory access out of bounds");
    w.block->launch->stats.local_accesses++;
    return w.local.data() + size_t(lane) * w.kernel->local_bytes + off;
  }
  return global_at(w, lane, a, bytes, access);
}
bool holds_already(Warp& w, const Instr& i, uint64_t a, const void* bytes, int n) {
  if (a % n || i.space == Space::Param || is_local(i, a)) return false;
  if (is_shared(i, a)) {
    uint64_t at = (a & ~kSharedTag) - kSharedBase;
    return at + n <= w.block->shared.size() && memcmp(w.block->shared.data() + at, bytes, n) == 0 &&
           same_shared(w, at, n);
  }
  return w.block->launch->settings.racecheck >= 2 && a >= 4096 && memcmp((const void*)a, bytes, n) == 0 &&
         same_global(w, a, n);
}

// ---- counts ----
static void count_shared(Stats& s, uint32_t mask, const uint64_t* at, int bytes) {
  // a wavefront serves each of the 32 banks once; wide accesses are served a part of the warp at a time
  int group = bytes >= 16 ? 8 : bytes == 8 ? 16 : 32, waves = 0, ideal = 0;
  for (int g = 0; g < kLanes; g += group) {
    uint64_t words[kLanes * 4];
    int n = 0;
    for (int l = g; l < g + group; ++l)
      if (mask >> l & 1)
        for (int k = 0; k < std::max(1, bytes / 4); ++k) words[n++] = (at[l] + 4 * k) / 4;
    if (!n) continue;
    std::sort(words, words + n);
    n = std::unique(words, words + n) - words;
    int per_bank[32] = {}, worst = 0;
    for (int k = 0; k < n; ++k) worst = std::max(worst, ++per_bank[words[k] % 32]);
    waves += worst;
    ideal += (n + 31) / 32;
  }
  s.shared_requests++;
  s.shared_waves += waves;
  s.shared_ideal += ideal;
}
static void count_global(Stats& s, uint32_t mask, const uint64_t* at, int bytes) {
  uint64_t sectors[kLanes * 2];
  int n = 0;
  for (int l = 0; l < kLanes; ++l)
    if (mask >> l & 1)
      for (uint64_t sector = at[l] / 32; sector <= (at[l] + bytes - 1) / 32; ++sector) sectors[n++] = sector;
  std::sort(sectors, sectors + n);
  s.global_requests++;
  s.global_sectors += std::unique(sectors, sectors + n) - sectors;
  s.global_ideal += (std::popcount(mask) * bytes + 31) / 32;
}
void count_access(Warp& w, Space space, uint32_t mask, const uint64_t* at, int bytes) {
  if (!mask) return;
  Stats& s = w.block->launch->stats;
  uint64_t any = at[std::countr_zero(mask)];
  if (space == Space::Shared || (space == Space::Generic && (any & kSharedTag)))
    count_shared(s, mask, at, bytes);
  else if (space == Space::Global || (space == Space::Generic && !(any & kLocalTag)))
    count_global(s, mask, at, bytes);
}

}  // namespace cusim
