// Rows in memory, and work divided over them.
#pragma once

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "dispatch.h"
#include "parallel.h"

namespace realign {

// Zeros that start on a cache line, so that no vector load of the kernels crosses two.
template <typename T>
class AlignedVector {
 public:
  AlignedVector() = default;
  explicit AlignedVector(int64_t size)
      : values_(static_cast<T*>(::operator new(size_t(size) * sizeof(T), std::align_val_t(64)))) {
    std::fill_n(data(), size, T());
  }
  T* data() { return values_.get(); }
  const T* data() const { return values_.get(); }

 private:
  struct Delete {
    void operator()(T* values) const { ::operator delete(values, std::align_val_t(64)); }
  };
  std::unique_ptr<T[], Delete> values_;
};

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
    AlignedVector<double> scratch(rows.range.dim);
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
