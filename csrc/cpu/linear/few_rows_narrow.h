// few_rows.h for a level's codes of 2 and 3 bits, in a part of its own: it is long to compile.
#pragma once

#include "common/linear.h"

namespace bitfuse::BITFUSE_ISA {

void few_rows_narrow(const LowbitLinearArgs& call);

}  // namespace bitfuse::BITFUSE_ISA
