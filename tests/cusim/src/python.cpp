// What Python calls: kernels of a PTX text, and the counts.
#include <cstdio>
#include <cstdlib>

#include "cusim.hpp"

using namespace cusim;

namespace {

const char* const kColumns =
    "kernel\tlaunches\tblocks\tthreads\twarp_instructions\tglobal_requests\tglobal_sectors\t"
    "global_sectors_ideal\tshared_requests\tshared_wavefronts\tshared_wavefronts_ideal\tlocal_accesses\n";
std::string table() {
  std::string out = kColumns;
  for (auto& [name, s] : all_stats()) {
    out += name;
    for (uint64_t v : {s.launches, s.blocks, s.threads, s.instructions, s.global_requests, s.global_sectors,
                       s.global_ideal, s.shared_requests, s.shared_waves, s.shared_ideal, s.local_accesses})
      out += "\t" + std::to_string(v);
    out += "\n";
  }
  return out;
}
// Writes the counts to the file that CUSIM_STATS names when the process ends.
struct Report {
  ~Report() {
    const char* to = getenv("CUSIM_STATS");
    if (!to || !*to || strcmp(to, "0") == 0 || strcmp(to, "1") == 0) return;
    FILE* f = strcmp(to, "-") == 0 ? stderr : fopen(to, "w");
    if (!f) return;
    fputs(table().c_str(), f);
    if (f != stderr) fclose(f);
  }
} g_report;

Module& module_of(const char* ptx) {
  static std::unordered_map<std::string, std::unique_ptr<Module>> cache;
  auto& m = cache[ptx];
  if (!m) m = parse_ptx(ptx);
  return *m;
}

}  // namespace

extern "C" {
// Runs one kernel. Returns null, or a message that the caller frees with cusim_free.
char* cusim_run_ptx(const char* ptx, const char* name, const unsigned* grid, const unsigned* block,
                    size_t shared, void** args) {
  try {
    Module& m = module_of(ptx);
    auto k = m.kernels.find(name);
    if (k == m.kernels.end()) throw Fault(std::string("no kernel named ") + name);
    launch(m, *k->second, grid, block, shared, args);
    return nullptr;
  } catch (const std::exception& e) {
    return strdup(e.what());
  }
}
// The counts so far as tab-separated lines, to be freed with cusim_free; `reset` starts them anew.
char* cusim_counts(int reset) {
  char* out = strdup(table().c_str());
  if (reset) all_stats().clear();
  return out;
}
void cusim_free(char* p) { free(p); }
}
