// Rows in memory, and work divided over them.
#pragma once

#include <vector>

#include "dispatch.h"
#include "parallel.h"

namespace realign {

struct Rows {
  RowRange range;
  Dtype dtype;

  int64_t bytes() const { return range.num_rows * range.dim * kItemsize[dtype]; }

  RowRange part(int64_t begin, int64_t end) const {
    return {range.data + begin * range.stride, range.stride, end - begin, range.dim};
  }
};

// Calls kernel(part, rows of the part, first row, scratch, bad rows) on each part and returns what all of them met.
template <typename Kernel>
BadRows for_each_part(const Rows& rows, int num_parts, const Kernel& kernel) {
  std::vector<BadRows> met(static_cast<size_t>(num_parts));
  parallel_for(num_parts, rows.range.num_rows, [&](int part, int64_t begin, int64_t end) {
    std::vector<double> scratch(static_cast<size_t>(rows.range.dim));
    BadRows& bad = met[size_t(part)];
    kernel(part, rows.part(begin, end), begin, scratch.data(), &bad);
    if (bad.first >= 0) bad.first += begin;
  });
  BadRows all;
  for (const BadRows& bad : met) {
    all.num_zero += bad.num_zero;
    all.num_nonfinite += bad.num_nonfinite;
    if (all.first < 0) all.first = bad.first;
  }
  return all;
}

}  // namespace realign
