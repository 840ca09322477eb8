// Maps of more than one step, a block of rows at a time, so that what one step leaves for the next stays in a cache:
// a matrix, the two projections of row_transform, noise.
#pragma once

#include "row_transform.h"

namespace realign {

// z = matrix (u - centre) + offset, prepared for the kernels of the instruction set in use.
class AffineMap {
 public:
  AffineMap(const double* matrix, const double* centre, const double* offset, int64_t out_dim, int64_t dim);
  int64_t dim() const { return dim_; }
  int64_t out_dim() const { return out_dim_; }
  // The matrix in panels of that width: those at hand, or new ones where another instruction set was chosen since.
  const float* panels(int64_t width, AlignedVector<float>* own) const;
  const float* offset() const { return offset_.data(); }
  const double* centre() const { return centre_.data(); }
  const float* minus_centre() const { return minus_centre_.data(); }

 private:
  AlignedVector<float> packed(int64_t width) const;

  int64_t dim_, out_dim_, width_;
  AlignedVector<double> centre_;
  AlignedVector<float> matrix_, minus_centre_, offset_, panels_;
};

// Steps that are null are left out; without `affine` there must be a `map`.
struct Stages {
  const AffineMap* affine;
  const RowMap* map;
  const Noise* noise;
};

// Bad rows become zeros. `out` may be the rows themselves, or must not overlap them.
BadRows staged_transform(const Rows& rows, const Stages& stages, char* out, int64_t out_stride, Dtype out_dtype,
                         int num_threads);

// Adds what `affine`, then `map` make of each good row to `sums`, as transformed_moments.
BadRows affine_moments(const Rows& rows, const AffineMap& affine, const RowMap& map, int64_t* sums, int num_threads);

}  // namespace realign
