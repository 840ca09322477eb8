// A tile of a symmetric matrix on its way into the whole, for the instruction set of the file that includes this.
#pragma once

#include "table.h"

namespace {

// products[i][j] += tile[i][j] for j <= i, the tile beginning at (first_row, first_column) of a dim x dim matrix.
inline void add_lower(const float* tile, int64_t first_row, int64_t first_column, int64_t dim, double* products) {
  using realign::kTileSide;
  for (int64_t i = 0; i < kTileSide && first_row + i < dim; ++i) {
    const int64_t past = first_row + i < first_column + kTileSide ? first_row + i + 1 : first_column + kTileSide;
    double* to = products + (first_row + i) * dim + first_column;
    for (int64_t j = 0; j < past - first_column; ++j) to[j] += double(tile[i * kTileSide + j]);
  }
}

}  // namespace
