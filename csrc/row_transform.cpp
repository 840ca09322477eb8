#include "row_transform.h"

namespace realign {
namespace {

// What is larger than this is not found in a cache by whoever reads it next: written past the caches it spares the
// memory a read of each line.
constexpr int64_t kStreamBytes = 16 << 20;

}  // namespace

RowMap::RowMap(double scale, const double* shift, const double* correction, int64_t dim)
    : dim_(dim), scale_(scale), shift64_(dim), correction64_(dim), shift_(dim + kPadding), correction_(dim + kPadding) {
  std::copy_n(shift, dim, shift64_.data());
  std::copy_n(correction, dim, correction64_.data());
  for (int64_t j = 0; j < dim; ++j) {
    shift_.data()[j] = float(shift[j]);
    correction_.data()[j] = float(correction[j]);
    shift_shift_ += shift[j] * shift[j];
    correction_correction_ += correction[j] * correction[j];
    shift_correction_ += shift[j] * correction[j];
  }
}

Map RowMap::view() const {
  return {scale_,       shift64_.data(),        correction64_.data(), shift_.data(), correction_.data(),
          shift_shift_, correction_correction_, shift_correction_};
}

BadRows row_transform(const Rows& rows, const std::vector<const RowMap*>& maps, const int64_t* domain, char* out,
                      int64_t out_stride, Dtype out_dtype, int num_threads) {
  const RowTransformKernel kernel = current_table().row_transform[rows.dtype][out_dtype];
  std::vector<Map> views;
  for (const RowMap* map : maps) views.push_back(map->view());
  const MapTable table{views.data(), domain};
  const int64_t out_bytes = rows.range.num_rows * rows.range.dim * kItemsize[out_dtype];
  const bool nontemporal = out != rows.range.data && out_bytes > kStreamBytes;
  const int num_parts = useful_threads(num_threads, rows.range.num_rows, rows.bytes());
  return for_each_range(rows, num_parts, [&](int, const RowRange& range, int64_t first, double* scratch, BadRows* bad) {
    kernel(range, table.from(first), out + first * out_stride, out_stride, nontemporal, scratch, bad);
  });
}

void row_transform_backward(const Rows& rows, const Rows& grad, const RowMap& map, char* out, int64_t out_stride,
                            int num_threads) {
  const GradientKernel kernel = current_table().row_transform_backward[rows.dtype][grad.dtype];
  const Map view = map.view();
  const int num_parts = useful_threads(num_threads, rows.range.num_rows, rows.bytes());
  for_each_range(rows, num_parts, [&](int, const RowRange& range, int64_t first, double* scratch, BadRows*) {
    kernel(range, grad.range.data + first * grad.range.stride, grad.range.stride, view, out + first * out_stride,
           out_stride, scratch);
  });
}

BadRows find_bad_rows(const Rows& rows, int num_threads) {
  const FindBadRowsKernel kernel = current_table().find_bad_rows[rows.dtype];
  const int num_parts = useful_threads(num_threads, rows.range.num_rows, rows.bytes());
  return for_each_range(rows, num_parts, [&](int, const RowRange& range, int64_t, double* scratch, BadRows* bad) {
    kernel(range, scratch, bad);
  });
}

}  // namespace realign
