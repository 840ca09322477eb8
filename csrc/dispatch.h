// Which instruction set runs: found once, and forced by name where a test wants it.
#pragma once

#include <string>
#include <vector>

#include "table.h"

namespace realign {

// Those that this build has and this processor runs, slowest first.
const std::vector<const KernelTable*>& available_tables();

const KernelTable& current_table();

// Those of this processor that take the panels of the table in use; null where there are none.
const FastKernels* fast_kernels();

// "auto" is the last of the available ones. Throws std::invalid_argument for one that cannot run here.
void use_table(const std::string& name);

}  // namespace realign
