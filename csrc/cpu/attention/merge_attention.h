// What weighs one set of keys' outputs against another's.
#pragma once

#include "cpu/core/activations.h"

namespace bitfuse::BITFUSE_ISA {

// e^x, as a vector's lane has it.
inline float exp_of(float x) {
  alignas(64) float lanes[kLanes];
  store(lanes, exponential(set1(x)));
  return lanes[0];
}

}  // namespace bitfuse::BITFUSE_ISA
