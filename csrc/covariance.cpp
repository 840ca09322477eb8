#include "covariance.h"

#include <cmath>

#include "moments.h"

namespace realign {
namespace {

// Rows that are normalised, then multiplied: their panels stay in a cache of the last level, and what is added to the
// result in float64 is little beside the products.
constexpr int64_t kBlockRows = 1024;
// Panels of so many rows fit in the first cache beside each other.
constexpr int64_t kLongestRun = 128;

// The rounding of sums of `a` products in registers and `b` in float32, over the norm of an isotropic covariance, is
// 2.4e-8 sqrt((a + b / a) dim / (2 num_rows)): of few rows, they must be short.
SumLengths sum_lengths(int64_t num_rows, int64_t dim) {
  const int64_t run = std::clamp(4 * num_rows / dim / 4 * 4, int64_t(4), kLongestRun);
  return {run, run < kLongestRun ? 4 * run : kBlockRows};
}

// Of the tiles, for each thread: some more than for memory, since none of them waits for it.
constexpr int64_t kPieces = 128;

int64_t triangle(int64_t side) { return side * (side + 1) / 2; }

}  // namespace

BadRows covariance(const Rows& rows, const double* pilot, int64_t* sums, uint64_t* keys, double* products,
                   int64_t num_seen, const FastKernels* fast, int num_threads) {
  const KernelTable& table = current_table();
  const int64_t num_rows = rows.range.num_rows, dim = rows.range.dim, width = table.panel_width;
  const int64_t num_tiles = (dim + kTileSide - 1) / kTileSide;
  const int64_t block_rows = std::min(kBlockRows, num_rows);
  AlignedVector<float> panels(num_tiles * kTileSide * block_rows), minus_pilot(dim + kPadding);
  for (int64_t j = 0; j < dim; ++j) minus_pilot.data()[j] = -float(pilot[j]);
  const Panels to{panels.data(), width, width * block_rows, pilot, minus_pilot.data()};
  const SumLengths lengths = sum_lengths(num_seen + num_rows, dim);
  const int64_t tile_bytes = kTileSide * kTileSide * int64_t(sizeof(double));
  const int64_t num_panels = num_tiles * kTileSide / width, pair_stride = fast ? fast->pair_words(block_rows) : 0;
  AlignedVector<uint32_t> pairs(num_panels * pair_stride);
  BadRows all;
  for (int64_t first = 0; first < num_rows; first += block_rows) {
    const int64_t count = std::min(block_rows, num_rows - first);
    const Rows block{rows.part(first, first + count), rows.dtype};
    add_bad_rows(moments(block, sums, keys ? keys + first : nullptr, &to, num_threads), first, &all);
    const int64_t num_pairs = (count + 1) / 2;
    if (fast)
      parallel_for(num_threads, num_panels, width * count, 1, [&](int, int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel)
          fast->to_pairs(panels.data() + panel * to.stride, count, pairs.data() + panel * pair_stride);
      });
    const auto multiply = [&](int, int64_t begin, int64_t end) {
      // Row by row through the triangle of tiles: tile number `begin` lies in the last row that does not start after
      // it.
      int64_t row = int64_t((std::sqrt(8 * double(begin) + 1) - 1) / 2);
      for (int64_t tile = begin; tile < end; ++tile) {
        if (tile >= triangle(row + 1)) ++row;
        const int64_t column = tile - triangle(row);
        if (fast)
          fast->products(pairs.data(), pair_stride, num_pairs, lengths, row, column, dim, products);
        else
          table.products(panels.data(), to.stride, count, lengths, row, column, dim, products);
      }
    };
    const int num_parts = useful_threads(num_threads, triangle(num_tiles), count * dim * dim);
    parallel_for(num_parts, triangle(num_tiles), tile_bytes, 1, multiply, kPieces);
  }
  return all;
}

}  // namespace realign
