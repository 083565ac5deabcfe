// bitfuse._cpu: addresses and sizes in, nothing out. Each op's binding, in a file of its own, checks what a
// wrong integer could break; here the level is picked.
#include "bind/cpu.h"

#include <cstdlib>
#include <string>

#include "bind/common.h"

namespace bitfuse {
namespace {

struct Candidate {
  const char* name;
  Level level;
  bool supported;
};

#if defined(__x86_64__)
#define BITFUSE_SUPPORTS(feature) (__builtin_cpu_supports(feature) != 0)
#else
#define BITFUSE_SUPPORTS(feature) false
#endif

Candidate pick_level() {
  const bool avx2 = BITFUSE_SUPPORTS("avx2") && BITFUSE_SUPPORTS("fma") && BITFUSE_SUPPORTS("f16c");
  const bool avx512 = avx2 && BITFUSE_SUPPORTS("avx512f") && BITFUSE_SUPPORTS("avx512bw") &&
                      BITFUSE_SUPPORTS("avx512dq") && BITFUSE_SUPPORTS("avx512vl");
  const bool avx512bf16 = avx512 && BITFUSE_SUPPORTS("avx512vnni") && BITFUSE_SUPPORTS("avx512bf16");
  const Candidate candidates[] = {
      {"avx512bf16", Level::kAvx512Bf16, avx512bf16},
      {"avx512", Level::kAvx512, avx512},
      {"avx2", Level::kAvx2, avx2},
      {"portable", Level::kPortable, true},
  };
  const char* asked = std::getenv("BITFUSE_CPU_ISA");
  for (const Candidate& candidate : candidates) {
    if (!asked || !*asked) {
      if (candidate.supported) return candidate;
    } else if (candidate.name == std::string(asked)) {
      if (candidate.supported) return candidate;
      throw py::value_error(std::string("BITFUSE_CPU_ISA is '") + asked +
                            "', which this machine does not support");
    }
  }
  throw py::value_error(std::string("BITFUSE_CPU_ISA is '") + asked +
                        "', expected one of portable, avx2, avx512, avx512bf16");
}

const Candidate& picked() {
  static const Candidate candidate = pick_level();
  return candidate;
}

}  // namespace

Level level() { return picked().level; }

}  // namespace bitfuse

PYBIND11_MODULE(_cpu, m) {
  m.doc() =
      "C++ kernels of bitfuse on the CPU. Arguments are addresses (Tensor.data_ptr()), sizes and strides.";
  // A function and not an attribute: what it raises for a bad BITFUSE_CPU_ISA stays a ValueError, where an
  // exception of the module's own initialisation would become an ImportError. bitfuse asks as it is imported.
  m.def("isa", [] { return bitfuse::picked().name; }, "The instruction-set level in use.");
  bitfuse::bind_common(m);
  bitfuse::bind_lowbit_linear(m);
  bitfuse::bind_lora_linear(m);
  bitfuse::bind_gated_activation(m);
  bitfuse::bind_multi_lora_linear(m);
  bitfuse::bind_adamw8bit(m);
  bitfuse::bind_attention(m);
  bitfuse::bind_decode_attention(m);
  bitfuse::bind_speculative_sample(m);
  bitfuse::bind_sample(m);
}
