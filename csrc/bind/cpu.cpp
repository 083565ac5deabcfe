// bitfuse._cpu: tensors in, those that are written among them. Each op's binding, in a file of its own, reads
// them where they lie and checks what a kernel could not read; here the level is picked.
#include "bind/cpu.h"

#include <cstdlib>
#include <string>

#include "bind/types.h"

namespace bitfuse {
namespace {

// A build of one level has its kernels alone, and BITFUSE_OF_LEVEL from the compiler's command line.
#ifdef BITFUSE_ONLY_LEVEL
constexpr bool kOneLevel = true;
constexpr bool is_built(Level level) { return level == Level::BITFUSE_ONLY_LEVEL; }
#else
constexpr bool kOneLevel = false;
constexpr bool is_built(Level) { return true; }
#endif

struct Candidate {
  const char* name;
  Level level;
  bool available;  // where the level below it is
};

#define CPU_HAS(feature) (__builtin_cpu_supports(#feature) != 0)
#define BITFUSE_CANDIDATE(level, available, ...) {#level, Level::level, available},

// The narrowest first.
Candidate pick_level() {
  const Candidate candidates[] = {BITFUSE_LEVELS(BITFUSE_CANDIDATE)};
  const char* asked = std::getenv("BITFUSE_CPU_ISA");
  const bool named = asked && *asked;
  const std::string said = named ? std::string("BITFUSE_CPU_ISA is '") + asked + "', " : "";
  const Candidate* widest = nullptr;
  std::string names;
  bool supported = true, known = false;
  for (const Candidate& candidate : candidates) {
    supported = supported && candidate.available;
    if (is_built(candidate.level)) names += (names.empty() ? "" : ", ") + std::string(candidate.name);
    if (named && candidate.name == std::string(asked)) {
      if (!supported) throw py::value_error(said + "which this machine does not support");
      if (is_built(candidate.level)) return candidate;
      known = true;
    }
    if (supported && is_built(candidate.level)) widest = &candidate;
  }
  if (known)
    throw py::value_error(said + "which this build lacks: made with BITFUSE_CPU_LEVELS=native, it has " +
                          names + " alone");
  if (named) throw py::value_error(said + "expected one of " + names);
  if (!widest)
    throw py::value_error("this build of bitfuse has the kernels of " + names +
                          " alone, which this machine does not support: build it without "
                          "BITFUSE_CPU_LEVELS=native");
  return *widest;
}

#undef BITFUSE_CANDIDATE
#undef CPU_HAS

const Candidate& picked() {
  static const Candidate candidate = pick_level();
  return candidate;
}

}  // namespace

Level level() { return picked().level; }

}  // namespace bitfuse

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "C++ kernels of bitfuse on the CPU. Arguments are tensors, or descriptors of the class Tensor.";
  // A function and not an attribute: what it raises for a bad BITFUSE_CPU_ISA stays a ValueError, where an
  // exception of the module's own initialisation would become an ImportError. bitfuse asks as it is imported.
  m.def("isa", [] { return bitfuse::picked().name; }, "The instruction-set level in use.");
  m.attr("ONE_LEVEL") = bitfuse::kOneLevel;
  bitfuse::bind_types(m);
  bitfuse::bind_lowbit_linear(m);
  bitfuse::bind_lora_linear(m);
  bitfuse::bind_lowbit_embedding(m);
  bitfuse::bind_gated_activation(m);
  bitfuse::bind_multi_lora_linear(m);
  bitfuse::bind_norm(m);
  bitfuse::bind_adamw8bit(m);
  bitfuse::bind_attention(m);
  bitfuse::bind_decode_attention(m);
  bitfuse::bind_speculative_sample(m);
  bitfuse::bind_sample(m);
  bitfuse::bind_decoder(m);
}
