// Row types of 16 bits: their bits, with no arithmetic of their own.
#pragma once

#include <cstddef>
#include <cstdint>

#include "table.h"

namespace {

struct Half {
  uint16_t bits;
};

struct Bf16 {
  uint16_t bits;
};

}  // namespace
