// A launch: its settings, its blocks, and the faults of the host's memory that become the kernel's.
#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <sstream>

#include "cusim.hpp"

namespace cusim {

// ---- settings ----
static int number(const char* name, int otherwise) {
  const char* v = getenv(name);
  return v && *v ? atoi(v) : otherwise;
}
Settings Settings::read() {
  Settings s;
  s.sm = number("CUSIM_SM", 90);
  s.multiprocessors = number("CUSIM_SMS", 4);
  s.racecheck = number("CUSIM_RACECHECK", 0);
  s.seed = unsigned(number("CUSIM_SEED", 0));
  s.resident = std::max(1, number("CUSIM_RESIDENT", 8));
  s.quantum = number("CUSIM_QUANTUM", s.seed ? 64 : 100000);
  const char* stats = getenv("CUSIM_STATS");
  s.count = stats && *stats && strcmp(stats, "0") != 0;
  s.trace = number("CUSIM_TRACE", 0);
  return s;
}
size_t Settings::shared_optin() const { return (sm >= 90 ? 227 : sm == 80 || sm == 87 ? 163 : 99) * 1024; }

// ---- statistics ----
std::map<std::string, Stats>& all_stats() {
  static auto* s = new std::map<std::string, Stats>;
  return *s;
}
void Stats::add(const Stats& o) {
  launches += o.launches, blocks += o.blocks, threads += o.threads, instructions += o.instructions;
  global_requests += o.global_requests, global_sectors += o.global_sectors, global_ideal += o.global_ideal;
  shared_requests += o.shared_requests, shared_waves += o.shared_waves, shared_ideal += o.shared_ideal;
  local_accesses += o.local_accesses;
}

// ---- messages ----
std::string pc_text(const Kernel& k, int pc) {
  if (pc < 0 || pc >= (int)k.code.size()) return "?";
  const Instr& i = k.code[pc];
  std::ostringstream o;
  if (i.loc >= 0) o << k.locs[i.loc].first << ":" << k.locs[i.loc].second << ", ";
  o << "PTX line " << i.line;
  if (i.line >= 1 && i.line <= (int)k.text->size()) o << ": " << (*k.text)[i.line - 1];
  return o.str();
}
static std::string place(const Block& b) {
  std::ostringstream o;
  o << "block (" << b.index[0] << "," << b.index[1] << "," << b.index[2] << ")";
  return o.str();
}
void fault(const Warp& w, int lane, const std::string& what) {
  const unsigned* size = w.block->launch->block;
  unsigned t = w.id * kLanes + lane;
  std::ostringstream o;
  o << what << "\n    kernel " << w.kernel->name << ", " << place(*w.block) << ", thread " << t % size[0]
    << "," << t / size[0] % size[1] << "," << t / (size[0] * size[1]) << "\n    "
    << pc_text(*w.kernel, w.cur);
  throw Fault(o.str());
}
[[noreturn]] static void stuck(const Kernel& kernel, const std::vector<std::unique_ptr<Block>>& live,
                               const char* why) {
  std::ostringstream o;
  o << "deadlock in " << kernel.name << ": " << why;
  for (auto& b : live)
    for (auto& w : b->warps)
      if (w->live && o.tellp() < 4000) {
        uint32_t at = w->blocked ? w->blocked : w->live;
        o << "\n    " << place(*b) << " warp " << w->id
          << (w->blocked    ? " at a barrier"
              : w->spinning ? " waiting in a loop"
                            : " at a warp collective that not all of its lanes reach, or in a loop")
          << ", " << pc_text(kernel, w->pc_of(std::countr_zero(at)));
      }
  throw Fault(o.str());
}

// ---- special registers ----
static const Launch& launch_of(const Warp& w) { return *w.block->launch; }
static unsigned thread_of(const Warp& w, int lane) { return w.id * kLanes + lane; }
template <int axis>
static uint64_t thread_index(const Warp& w, int lane) {
  const unsigned* size = launch_of(w).block;
  unsigned t = thread_of(w, lane);
  return axis == 0 ? t % size[0] : axis == 1 ? t / size[0] % size[1] : t / (size[0] * size[1]);
}
template <int axis>
static uint64_t block_size(const Warp& w, int) {
  return launch_of(w).block[axis];
}
template <int axis>
static uint64_t block_index(const Warp& w, int) {
  return w.block->index[axis];
}
template <int axis>
static uint64_t grid_size(const Warp& w, int) {
  return launch_of(w).grid[axis];
}
template <uint64_t value>
static uint64_t constant(const Warp&, int) {
  return value;
}
SpecialFn special_register(const std::string& name) {
  static const std::unordered_map<std::string, SpecialFn> table = {
      {"%tid.x", thread_index<0>},
      {"%tid.y", thread_index<1>},
      {"%tid.z", thread_index<2>},
      {"%ntid.x", block_size<0>},
      {"%ntid.y", block_size<1>},
      {"%ntid.z", block_size<2>},
      {"%ctaid.x", block_index<0>},
      {"%ctaid.y", block_index<1>},
      {"%ctaid.z", block_index<2>},
      {"%nctaid.x", grid_size<0>},
      {"%nctaid.y", grid_size<1>},
      {"%nctaid.z", grid_size<2>},
      {"%clusterid.x", block_index<0>},
      {"%clusterid.y", block_index<1>},
      {"%clusterid.z", block_index<2>},
      {"%nclusterid.x", grid_size<0>},
      {"%nclusterid.y", grid_size<1>},
      {"%nclusterid.z", grid_size<2>},
      {"%cluster_ctaid.x", constant<0>},
      {"%cluster_ctaid.y", constant<0>},
      {"%cluster_ctaid.z", constant<0>},
      {"%cluster_nctaid.x", constant<1>},
      {"%cluster_nctaid.y", constant<1>},
      {"%cluster_nctaid.z", constant<1>},
      {"%cluster_ctarank", constant<0>},
      {"%cluster_nctarank", constant<1>},
      {"%laneid", [](const Warp&, int l) -> uint64_t { return l; }},
      {"%warpid", [](const Warp& w, int) -> uint64_t { return w.id; }},
      {"%nwarpid", [](const Warp& w, int) -> uint64_t { return w.block->warp_count; }},
      {"%smid", [](const Warp& w, int) { return w.block->linear % launch_of(w).settings.multiprocessors; }},
      {"%nsmid", [](const Warp& w, int) -> uint64_t { return launch_of(w).settings.multiprocessors; }},
      {"%lanemask_eq", [](const Warp&, int l) -> uint64_t { return 1u << l; }},
      {"%lanemask_lt", [](const Warp&, int l) -> uint64_t { return (1u << l) - 1; }},
      {"%lanemask_le", [](const Warp&, int l) -> uint64_t { return (2ull << l) - 1; }},
      {"%lanemask_gt", [](const Warp&, int l) -> uint64_t { return uint32_t(~((2ull << l) - 1)); }},
      {"%lanemask_ge", [](const Warp&, int l) -> uint64_t { return uint32_t(~((1ull << l) - 1)); }},
      {"%dynamic_smem_size", [](const Warp& w, int) -> uint64_t { return launch_of(w).dynamic_shared; }},
      {"%total_smem_size", [](const Warp& w, int) -> uint64_t { return w.block->shared.size(); }},
      {"%clock", constant<0>},
      {"%clock_hi", constant<0>},
      {"%clock64", constant<0>},
      {"%globaltimer", constant<0>},
      {"%globaltimer_lo", constant<0>},
      {"%globaltimer_hi", constant<0>}};
  auto it = table.find(name);
  return it == table.end() ? nullptr : it->second;
}

// ---- blocks ----
static void start_warp(Block& b, int id, int lanes) {
  Launch& L = *b.launch;
  auto w = std::make_unique<Warp>();
  w->block = &b;
  w->kernel = L.kernel;
  w->id = id;
  bool whole_grid = L.settings.racecheck >= 2;
  uint64_t blocks = uint64_t(L.grid[0]) * L.grid[1] * L.grid[2];
  w->actor = whole_grid ? int(b.linear * b.warp_count + id) : id;
  w->live = lanes == kLanes ? kAllLanes : (1u << lanes) - 1;
  w->regs.assign(size_t(L.kernel->registers) * kLanes, 0xdeadbeefdeadbeefull);
  w->local.assign(L.kernel->local_bytes * kLanes, char(0xff));
  w->clock.assign(whole_grid ? blocks * b.warp_count : b.warp_count, 0);
  tick(*w);
  for (auto& [value, row] : L.kernel->special)
    for (int l = 0; l < kLanes; ++l) w->regs[size_t(row) * kLanes + l] = value(*w, l);
  b.warps.push_back(std::move(w));
}
static void start_block(Block& b, Launch& L, uint64_t linear) {
  b.launch = &L;
  b.linear = linear;
  b.index[0] = linear % L.grid[0];
  b.index[1] = linear / L.grid[0] % L.grid[1];
  b.index[2] = linear / L.grid[0] / L.grid[1];
  b.shared.assign(L.kernel->shared_static + L.dynamic_shared, char(0xff));  // NaN in every float format
  b.rng = L.settings.seed * 2654435761u + unsigned(linear) + 1;
  int threads = L.block[0] * L.block[1] * L.block[2];
  b.warp_count = (threads + kLanes - 1) / kLanes;
  if (L.settings.racecheck) {
    size_t words = b.shared.size() / 4 + 1;
    b.shadow.resize(words);
    b.read_clock.resize(words * b.warp_count);
  }
  for (int k = 0; k < b.warp_count; ++k) start_warp(b, k, std::min(kLanes, threads - kLanes * k));
}
static void run_blocks(Launch& L) {
  uint64_t total = uint64_t(L.grid[0]) * L.grid[1] * L.grid[2], next = 0, effects = 0;
  // how often every warp may look for a change without one before they are said to wait for ever
  const int patience = L.settings.seed ? 20000 : 1000;
  int idle = 0;
  std::vector<std::unique_ptr<Block>> live;
  while (next < total || !live.empty()) {
    while (live.size() < (size_t)L.settings.resident && next < total) {
      live.push_back(std::make_unique<Block>());
      start_block(*live.back(), L, next++);
    }
    bool moved = false;
    for (auto& b : live) moved |= b->run(L.settings.quantum);
    moved |= std::erase_if(live, [](auto& b) { return b->done(); }) > 0;
    idle = L.effects == effects ? idle + 1 : 0;
    effects = L.effects;
    if (!moved) stuck(*L.kernel, live, "no warp can move");
    if (idle > patience) stuck(*L.kernel, live, "every warp waits for what no warp will do");
  }
}

// ---- faults of the host's memory ----
// A kernel runs between sigsetjmp and its end on one thread; a bad address there is the kernel's.
static thread_local sigjmp_buf t_jump;
static thread_local volatile sig_atomic_t t_running = 0;
static thread_local void* volatile t_bad = nullptr;

namespace {
// Catches bad accesses while it lives.
class BadAccess {
 public:
  BadAccess() {
    struct sigaction action = {};
    action.sa_sigaction = caught;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &action, &old_segv_);
    sigaction(SIGBUS, &action, &old_bus_);
    t_running = 1;
  }
  ~BadAccess() {
    t_running = 0;
    sigaction(SIGSEGV, &old_segv_, nullptr);
    sigaction(SIGBUS, &old_bus_, nullptr);
  }
  BadAccess(const BadAccess&) = delete;
  BadAccess& operator=(const BadAccess&) = delete;

 private:
  static void caught(int sig, siginfo_t* info, void*) {
    if (!t_running) {  // of another thread: as if nobody listened
      signal(sig, SIG_DFL);
      raise(sig);
      return;
    }
    t_bad = info->si_addr;
    siglongjmp(t_jump, 1);
  }
  struct sigaction old_segv_, old_bus_;
};
}  // namespace

void launch(Module& module, const Kernel& kernel, const unsigned grid[3], const unsigned block[3],
            size_t dynamic_shared, void** args, bool cooperative) {
  static std::mutex one_at_a_time;
  std::lock_guard lock(one_at_a_time);
  Launch L;
  L.kernel = &kernel;
  L.module = &module;
  L.settings = Settings::read();
  L.dynamic_shared = dynamic_shared;
  std::copy(grid, grid + 3, L.grid);
  std::copy(block, block + 3, L.block);
  L.params.resize(kernel.param_bytes + 64);
  for (size_t k = 0; k < kernel.param_offset.size(); ++k)
    memcpy(L.params.data() + kernel.param_offset[k], args[k], kernel.param_size[k]);
  uint64_t total = uint64_t(grid[0]) * grid[1] * grid[2];
  uint64_t threads = uint64_t(block[0]) * block[1] * block[2];
  if (threads > (uint64_t)kernel.max_threads || threads == 0 || total == 0)
    throw Fault("invalid launch configuration of " + kernel.name + ": " + std::to_string(threads) +
                " threads a block, " + std::to_string(total) + " blocks; the kernel allows " +
                std::to_string(kernel.max_threads) + " threads");
  if (size_t bytes = kernel.shared_static + dynamic_shared; bytes > L.settings.shared_optin())
    throw Fault(kernel.name + " asks for " + std::to_string(bytes) + " bytes of shared memory; sm_" +
                std::to_string(L.settings.sm) + " has " + std::to_string(L.settings.shared_optin()));
  if (cooperative) L.settings.resident = int(total);  // its blocks may wait for one another
  if (L.settings.trace)
    fprintf(stderr, "cusim: %s grid (%u,%u,%u) block (%u,%u,%u) dynamic shared %zu\n", kernel.name.c_str(),
            grid[0], grid[1], grid[2], block[0], block[1], block[2], dynamic_shared);

  {
    BadAccess listening;
    if (sigsetjmp(t_jump, 1)) {
      std::ostringstream o;
      o << "invalid global memory access at " << t_bad;
      fault(*L.stepping, std::countr_zero(L.stepping->live | 1u << 31), o.str());
    }
    run_blocks(L);
  }
  L.stats.launches = 1;
  L.stats.blocks = total;
  L.stats.threads = total * threads;
  all_stats()[kernel.name].add(L.stats);
}

}  // namespace cusim
