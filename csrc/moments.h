// Fixed-point sums of unit rows.
#pragma once

#include "row_transform.h"
#include "rows.h"

namespace realign {

// Adds each good row, normalised, to `sums` (dim); `keys` (num_rows) and `panels` may be null.
BadRows moments(const Rows& rows, int64_t* sums, uint64_t* keys, const Panels* panels, int num_threads);

// The same of the rows that row_transform would write, as a sum of their parts: of a u + b shift + c correction the a u
// in `sums` (dim + kNumFactors), and behind them the b and the c. See RowMap::add_up.
BadRows transformed_moments(const Rows& rows, const RowMap& map, int64_t* sums, int num_threads);

}  // namespace realign
