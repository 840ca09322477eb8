#include "row_transform.h"

#include <cmath>

namespace realign {
namespace {

constexpr double kUnits = double(int64_t(1) << kFixedPointBits);

// More of it would leave too few bits for sums of mapped rows: what is longer goes the long way.
constexpr double kMostRoom = 1 << 16;

// The least that is not below x, of 1, 2, 4 and so on: the same on every machine, since sums that are kept count in it.
double power_of_two(double x) {
  int exponent;
  const double mantissa = std::frexp(std::clamp(x, 1.0, 0x1p500), &exponent);
  return std::ldexp(1.0, mantissa == 0.5 ? exponent - 1 : exponent);
}

// What is larger than this is not found in a cache by whoever reads it next: written past the caches it spares the
// memory a read of each line.
constexpr int64_t kStreamBytes = 16 << 20;

// Of rows from anywhere: what is brought together before it is mapped, which stays in the cache of a core; how many are
// asked for ahead; and from which size on what they become is written past the caches.
constexpr int64_t kTakenBytes = 64 << 10, kStreamTakenBytes = 4 << 20;
constexpr int64_t kTakenAhead = 4;

inline void fetch(const char* data, int64_t size) {
  for (int64_t at = 0; at < size; at += 64) __builtin_prefetch(data + at);
}

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
  // Of a mapped row, which has length 1, the row's part may be longer: by so much at most where the fused form serves.
  // Sums of eight have room for twice the length of 1.
  const double distance = std::fabs(std::fabs(scale) - std::sqrt(shift_shift_));
  const double longest = std::fabs(scale) * std::min(2.0, 1 / distance);
  room_ = power_of_two(std::min(longest / 2, kMostRoom));
}

// A factor times its vector is hardly longer than the row's part, and an element of a vector is shorter than it: an
// eighth of the units keeps its digits, and leaves room for as many rows.
Map RowMap::view() const {
  const double units = kUnits / room_;
  return {scale_,
          shift64_.data(),
          correction64_.data(),
          shift_.data(),
          correction_.data(),
          shift_shift_,
          correction_correction_,
          shift_correction_,
          units,
          units / 8 * power_of_two(std::sqrt(shift_shift_)),
          units / 8 * power_of_two(std::sqrt(correction_correction_)),
          1.99 * room_ / std::fabs(scale_)};
}

void RowMap::add_up(const int64_t* mapped, int64_t* sums) const {
  const Map map = view();
  const double of_shift = double(mapped[dim_]) / map.shift_units;
  const double of_correction = double(mapped[dim_ + 1]) / map.correction_units;
  for (int64_t j = 0; j < dim_; ++j) {
    const double vectors = of_shift * map.shift64[j] + of_correction * map.correction64[j];
    sums[j] += int64_t(std::rint(double(mapped[j]) * room_ + vectors * kUnits));
  }
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

BadRows take_rows(const Rows& rows, const int64_t* numbers, const Rows& out, const RowMap* map, int num_threads) {
  const RowTransformKernel kernel = current_table().row_transform[rows.dtype][rows.dtype];
  const Map view = map ? map->view() : Map();
  const MapTable table{&view, nullptr};
  const int64_t row_bytes = out.range.stride;
  const int64_t at_once = std::max<int64_t>(1, kTakenBytes / row_bytes);
  const bool nontemporal = out.bytes() > kStreamTakenBytes;
  const int num_parts = useful_threads(num_threads, out.range.num_rows, out.bytes());
  return for_each_range(out, num_parts, [&](int, const RowRange& range, int64_t first, double* scratch, BadRows* bad) {
    const auto row_of = [&](int64_t i) { return rows.range.data + numbers[first + i] * rows.range.stride; };
    AlignedVector<char> taken(map ? at_once * row_bytes : 0);
    for (int64_t done = 0; done < range.num_rows; done += at_once) {
      const int64_t count = std::min(at_once, range.num_rows - done);
      char* const target = const_cast<char*>(range.data) + done * row_bytes;
      char* const to = map ? taken.data() : target;
      for (int64_t i = 0; i < count; ++i) {
        if (done + i + kTakenAhead < range.num_rows) fetch(row_of(done + i + kTakenAhead), row_bytes);
        current_table().stream_copy(row_of(done + i), to + i * row_bytes, row_bytes, nontemporal && !map);
      }
      if (!map) continue;
      BadRows of_part;
      kernel({to, row_bytes, count, range.dim}, table, target, row_bytes, nontemporal, scratch, &of_part);
      add_bad_rows(of_part, done, bad);
    }
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
