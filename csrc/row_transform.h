// The fused map of rows: out = pi(pi(scale u + shift) + correction), u = pi(row), pi(z) = z / ||z||, pi(0) = 0.
#pragma once

#include "rows.h"

namespace realign {

// The map's vectors as the kernels read them.
class MapVectors {
 public:
  MapVectors(double scale, const double* shift, const double* correction, int64_t dim);
  Map view() const;

 private:
  double scale_;
  const double *shift64_, *correction64_;
  AlignedVector<float> shift_, correction_;
  double shift_shift_ = 0, correction_correction_ = 0, shift_correction_ = 0;
};

// `out` may be the rows themselves, or must not overlap them. Bad rows become zeros.
BadRows row_transform(const Rows& rows, const MapVectors& map, char* out, int64_t out_stride, Dtype out_dtype,
                      int num_threads);

BadRows find_bad_rows(const Rows& rows, int num_threads);

}  // namespace realign
