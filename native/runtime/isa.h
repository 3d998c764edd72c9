// Which instruction-set levels this processor and operating system can run.
#pragma once

#include <string>
#include <vector>

#include "gristmill/kernel.h"

namespace gm {

// Names of the levels that can run here, ascending.
std::vector<std::string> available_levels();
// All levels compiled into this library, ascending.
std::vector<std::string> compiled_levels();
// The table of a level by name; throws std::invalid_argument if unknown or not able to run here.
const KernelTable* kernel_table(const std::string& level);
// The highest available level, or the one that GRISTMILL_ISA names (an unavailable one throws).
std::string default_level();

}  // namespace gm
