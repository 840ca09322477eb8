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

// Adds what a range that begins at row `begin` met. Ranges may come in any order.
inline void add_bad_rows(const BadRows& of_range, int64_t begin, BadRows* all) {
  all->num_zero += of_range.num_zero;
  all->num_nonfinite += of_range.num_nonfinite;
  if (of_range.first < 0) return;
  const int64_t first = begin + of_range.first;
  all->first = all->first < 0 ? first : std::min(all->first, first);
}

// Reads a byte here and there, so that the pages of a mapped file are there: the kernels ask for memory ahead, and of a
// page that is not yet mapped nothing is fetched. The system maps as much around the one that is read.
inline void map_pages(const RowRange& rows) {
  constexpr int64_t kMappedAround = 64 << 10;
  const int64_t last = (rows.num_rows - 1) * rows.stride;
  for (int64_t at = 0; at <= last; at += kMappedAround) (void)*static_cast<const volatile char*>(rows.data + at);
}

// Calls kernel(part, rows, first of them, scratch, bad rows) on one range of the rows after the other, that begin at
// multiples of `multiple`, and returns what all of them met.
template <typename Kernel>
BadRows for_each_range(const Rows& rows, int num_parts, const Kernel& kernel, int64_t multiple = kRowsPerBlock) {
  struct Part {
    AlignedVector<double> scratch;
    BadRows met;
  };
  std::vector<Part> parts;
  for (int part = 0; part < num_parts; ++part) parts.push_back({AlignedVector<double>(rows.range.dim), BadRows()});
  const int64_t row_bytes = rows.range.dim * kItemsize[rows.dtype];
  parallel_for(num_parts, rows.range.num_rows, row_bytes, multiple, [&](int part, int64_t begin, int64_t end) {
    Part& mine = parts[size_t(part)];
    const RowRange range = rows.part(begin, end);
    map_pages(range);
    BadRows bad;
    kernel(part, range, begin, mine.scratch.data(), &bad);
    add_bad_rows(bad, begin, &mine.met);
  });
  BadRows all;
  for (const Part& part : parts) add_bad_rows(part.met, 0, &all);
  return all;
}

}  // namespace realign
