#include "moments.h"

namespace realign {
namespace {

// Pseudo-random magnitudes in [0.5, 1) with pseudo-random signs, padded: a fixed direction that no data set knows.
AlignedVector<float> projection(int64_t dim) {
  AlignedVector<float> values(dim + kPadding);
  uint64_t state = 0;
  for (int64_t j = 0; j < dim; ++j) {
    state += 0x9e3779b97f4a7c15u;
    uint64_t x = state;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    x ^= x >> 31;
    const float magnitude = 0.5f + 0.5f * float(x >> 40) * 0x1p-24f;
    values.data()[j] = x & 1 ? magnitude : -magnitude;
  }
  return values;
}

// Calls kernel(part, rows, first row, sums, scratch, bad rows) with sums of its own for each part, and adds these up.
template <typename Kernel>
BadRows sum_parts(const Rows& rows, int64_t* sums, int64_t num_sums, int num_threads, const Kernel& kernel) {
  const int num_parts = useful_threads(num_threads, rows.range.num_rows, rows.bytes());
  // Whole cache lines apart, so that no two threads write to one.
  const int64_t stride = (num_sums + 7) / 8 * 8;
  AlignedVector<int64_t> partial(stride * num_parts);
  const BadRows bad = for_each_range(
      rows, num_parts, [&](int part, const RowRange& range, int64_t first, double* scratch, BadRows* met) {
        kernel(range, first, partial.data() + stride * part, scratch, met);
      });
  for (int part = 0; part < num_parts; ++part)
    for (int64_t j = 0; j < num_sums; ++j) sums[j] += partial.data()[stride * part + j];
  return bad;
}

}  // namespace

BadRows moments(const Rows& rows, int64_t* sums, uint64_t* keys, const Panels* panels, int num_threads) {
  const MomentsKernel kernel = current_table().moments[rows.dtype];
  const AlignedVector<float> direction = keys ? projection(rows.range.dim) : AlignedVector<float>();
  return sum_parts(rows, sums, rows.range.dim, num_threads,
                   [&](const RowRange& range, int64_t first, int64_t* part, double* scratch, BadRows* bad) {
                     Panels from;
                     if (panels) from = panels->from(first);
                     kernel(range, part, keys ? keys + first : nullptr, direction.data(), panels ? &from : nullptr,
                            scratch, bad);
                   });
}

BadRows transformed_moments(const Rows& rows, const RowMap& map, int64_t* sums, int num_threads) {
  const TransformedMomentsKernel kernel = current_table().transformed_moments[rows.dtype];
  const Map view = map.view();
  return sum_parts(rows, sums, rows.range.dim + kNumFactors, num_threads,
                   [&](const RowRange& range, int64_t, int64_t* part, double* scratch, BadRows* bad) {
                     kernel(range, view, part, scratch, bad);
                   });
}

}  // namespace realign
