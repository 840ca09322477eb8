#include "stages.h"

#include <cstring>

namespace realign {
namespace {

// Their results of a step fit in a cache of the second level, and there is enough to do for each read of the matrix.
constexpr int64_t kStageRows = 128;

// Rows of whole panels and one line more, so that not all of them begin in one set of the cache.
int64_t padded(int64_t dim) { return (dim + kTileSide - 1) / kTileSide * kTileSide + 16; }

// What one thread needs for a block.
struct Workspace {
  AlignedVector<float> units, rows, noise;
  AlignedVector<int64_t> sums;
};

// Unit rows of a block less the centre, then the matrix: rows of `stride` floats in `work->rows`, zeros for bad ones.
void apply_affine(const KernelTable& table, const Rows& block, const AffineMap& affine, const float* matrix,
                  const Panels& units, int64_t stride, Workspace* work, double* scratch, BadRows* bad) {
  const RowRange& range = block.range;
  table.moments[block.dtype](range, work->sums.data(), nullptr, nullptr, &units, scratch, bad);
  const int64_t whole = (range.num_rows + kRowsPerBlock - 1) / kRowsPerBlock * kRowsPerBlock;
  for (int64_t i = 0; i < whole; ++i) std::copy_n(affine.offset(), affine.out_dim(), work->rows.data() + i * stride);
  table.affine(units.data, units.width, whole, range.dim, matrix, affine.out_dim(), work->rows.data(), stride);
  if (bad->first < 0) return;
  for (int64_t i = bad->first; i < range.num_rows; ++i) {
    BadRows of_row;
    table.find_bad_rows[block.dtype](block.part(i, i + 1), scratch, &of_row);
    if (of_row.first == 0) std::fill_n(work->rows.data() + i * stride, affine.out_dim(), 0.0f);
  }
}

// Calls consume(part, rows of float32, first of them, workspace, scratch) for one block after the other, once `affine`
// or else `map` has been applied.
template <typename Consume>
BadRows for_each_block(const Rows& rows, const AffineMap* affine, const RowMap* map, int num_threads,
                       const Consume& consume) {
  const KernelTable& table = current_table();
  const int64_t dim = rows.range.dim, out_dim = affine ? affine->out_dim() : dim;
  const int64_t capacity =
      std::min(kStageRows, (rows.range.num_rows + kRowsPerBlock - 1) / kRowsPerBlock * kRowsPerBlock);
  const int64_t width = padded(dim), stride = padded(out_dim);
  AlignedVector<float> own_panels;
  const float* matrix = affine ? affine->panels(table.panel_width, &own_panels) : nullptr;
  const Map view = map ? map->view() : Map();
  const int num_parts =
      useful_threads(num_threads, rows.range.num_rows, rows.range.num_rows * dim * (affine ? out_dim : 16));
  std::vector<Workspace> work;
  for (int part = 0; part < num_parts; ++part)
    work.push_back({AlignedVector<float>(affine ? capacity * width : 0), AlignedVector<float>(capacity * stride),
                    AlignedVector<float>(out_dim + kPadding), AlignedVector<int64_t>(dim)});
  const auto kernel = [&](int part, const RowRange& range, int64_t first, double* scratch, BadRows* bad) {
    Workspace& mine = work[size_t(part)];
    const Panels units{mine.units.data(), width, 0, affine ? affine->centre() : nullptr,
                       affine ? affine->minus_centre() : nullptr};
    for (int64_t begin = 0; begin < range.num_rows; begin += kStageRows) {
      const int64_t count = std::min(kStageRows, range.num_rows - begin);
      const Rows block{Rows{range, rows.dtype}.part(begin, begin + count), rows.dtype};
      BadRows met;
      const RowRange result{reinterpret_cast<const char*>(mine.rows.data()), stride * int64_t(sizeof(float)), count,
                            out_dim};
      if (affine)
        apply_affine(table, block, *affine, matrix, units, stride, &mine, scratch, &met);
      else
        table.row_transform[rows.dtype][kFloat32](block.range, MapTable{&view, nullptr},
                                                  reinterpret_cast<char*>(mine.rows.data()), result.stride, false,
                                                  scratch, &met);
      add_bad_rows(met, begin, bad);
      consume(part, result, first + begin, &mine, scratch);
    }
  };
  return for_each_range(rows, num_parts, kernel, kStageRows);
}

}  // namespace

AffineMap::AffineMap(const double* matrix, const double* centre, const double* offset, int64_t out_dim, int64_t dim)
    : dim_(dim),
      out_dim_(out_dim),
      width_(current_table().panel_width),
      centre_(dim),
      matrix_(out_dim * dim),
      minus_centre_(dim + kPadding),
      offset_(out_dim) {
  std::copy_n(matrix, out_dim * dim, matrix_.data());
  std::copy_n(offset, out_dim, offset_.data());
  std::copy_n(centre, dim, centre_.data());
  for (int64_t j = 0; j < dim; ++j) minus_centre_.data()[j] = -float(centre[j]);
  panels_ = packed(width_);
}

AlignedVector<float> AffineMap::packed(int64_t width) const {
  AlignedVector<float> panels((out_dim_ + width - 1) / width * width * dim_);
  for (int64_t j = 0; j < out_dim_; ++j)
    for (int64_t k = 0; k < dim_; ++k)
      panels.data()[(j / width * dim_ + k) * width + j % width] = matrix_.data()[j * dim_ + k];
  return panels;
}

const float* AffineMap::panels(int64_t width, AlignedVector<float>* own) const {
  if (width == width_) return panels_.data();
  *own = packed(width);
  return own->data();
}

BadRows staged_transform(const Rows& rows, const Stages& stages, char* out, int64_t out_stride, Dtype out_dtype,
                         int num_threads) {
  const KernelTable& table = current_table();
  const RowMap* after = stages.affine ? stages.map : nullptr;
  const Map view = after ? after->view() : Map();
  const MapTable maps{&view, nullptr};
  return for_each_block(
      rows, stages.affine, stages.map, num_threads,
      [&](int, const RowRange& block, int64_t first, Workspace* work, double* scratch) {
        char* to = out + first * out_stride;
        BadRows seen;
        if (after && !stages.noise)
          return table.row_transform[kFloat32][out_dtype](block, maps, to, out_stride, false, scratch, &seen);
        float* values = work->rows.data();
        if (after)
          table.row_transform[kFloat32][kFloat32](block, maps, reinterpret_cast<char*>(values), block.stride, false,
                                                  scratch, &seen);
        const Noise noise = stages.noise ? stages.noise->from(first) : Noise();
        table.write[out_dtype](values, block.stride / int64_t(sizeof(float)), block.num_rows, block.dim,
                               stages.noise ? &noise : nullptr, to, out_stride, work->noise.data());
      });
}

BadRows affine_moments(const Rows& rows, const AffineMap& affine, const RowMap& map, int64_t* sums, int num_threads) {
  const TransformedMomentsKernel kernel = current_table().transformed_moments[kFloat32];
  const Map view = map.view();
  const int64_t num_sums = affine.out_dim() + kNumFactors, stride = (num_sums + 7) / 8 * 8;
  AlignedVector<int64_t> partial(stride * num_threads);
  const BadRows bad = for_each_block(rows, &affine, nullptr, num_threads,
                                     [&](int part, const RowRange& block, int64_t, Workspace*, double* scratch) {
                                       BadRows seen;
                                       kernel(block, view, partial.data() + stride * part, scratch, &seen);
                                     });
  for (int part = 0; part < num_threads; ++part)
    for (int64_t j = 0; j < num_sums; ++j) sums[j] += partial.data()[stride * part + j];
  return bad;
}

}  // namespace realign
