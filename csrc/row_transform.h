// The fused map of rows: out = pi(pi(scale u + shift) + correction), u = pi(row), pi(z) = z / ||z||, pi(0) = 0.
#pragma once

#include "rows.h"

namespace realign {

// A map as the kernels read it. Its vectors are copied and prepared once, for any number of batches.
class RowMap {
 public:
  RowMap(double scale, const double* shift, const double* correction, int64_t dim);
  int64_t dim() const { return dim_; }
  // Adds to `sums` (dim) what transformed_moments found altogether, `mapped` (dim + kNumFactors).
  void add_up(const int64_t* mapped, int64_t* sums) const;
  Map view() const;

 private:
  int64_t dim_;
  double scale_;
  AlignedVector<double> shift64_, correction64_;
  AlignedVector<float> shift_, correction_;
  double shift_shift_ = 0, correction_correction_ = 0, shift_correction_ = 0;
  double room_;
};

// `out` may be the rows themselves, or must not overlap them. Bad rows become zeros. `domain` holds the number of each
// row's map, or is null where there is one map.
BadRows row_transform(const Rows& rows, const std::vector<const RowMap*>& maps, const int64_t* domain, char* out,
                      int64_t out_stride, Dtype out_dtype, int num_threads);

// out[i] = the row with number numbers[i], mapped unless `map` is null. `out` is contiguous, has the dtype of the rows
// and does not overlap them; the numbers must be good.
BadRows take_rows(const Rows& rows, const int64_t* numbers, const Rows& out, const RowMap* map, int num_threads);

// The gradient with respect to `rows` of sum(grad * what the map makes of them), in their dtype; 0 for bad rows. `out`
// overlaps neither.
void row_transform_backward(const Rows& rows, const Rows& grad, const RowMap& map, char* out, int64_t out_stride,
                            int num_threads);

BadRows find_bad_rows(const Rows& rows, int num_threads);

}  // namespace realign
