// Sums of products of unit rows: the symmetric update that a covariance is made of.
#pragma once

#include "rows.h"

namespace realign {

// Adds each good row u, normalised, to `sums` (dim) as `moments` does, and (u - pilot)(u - pilot)^T to the lower
// triangle of `products` (dim x dim), in one read of the rows. The same bits for any number of threads. `num_seen` rows
// are in them already: the more, the less does the rounding of a float32 sum weigh, and the longer may it be. With
// `fast` kernels, which may be null, the products are of bfloat16.
BadRows covariance(const Rows& rows, const double* pilot, int64_t* sums, uint64_t* keys, double* products,
                   int64_t num_seen, const FastKernels* fast, int num_threads);

}  // namespace realign
