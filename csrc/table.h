// What an instruction set provides: one table of kernels over a range of rows. Plain data only.
#pragma once

#include <cstdint>

namespace realign {

enum Dtype { kFloat16 = 0, kBfloat16 = 1, kFloat32 = 2, kFloat64 = 3 };
constexpr int kNumDtypes = 4;
constexpr int64_t kItemsize[kNumDtypes] = {2, 2, 4, 8};

// Sums of unit rows count in units of 2^-27: eight rows fit in an int32, 2^36 rows in an int64.
constexpr int kFixedPointBits = 27;
constexpr int kRowsPerBlock = 8;

// Vectors that kernels read are followed by so many zeros, so that the last load needs no mask.
constexpr int64_t kPadding = 32;

// Side of the square tiles that a matrix is computed in; every panel width divides it.
constexpr int64_t kTileSide = 48;

struct RowRange {
  const char* data;
  int64_t stride;  // in bytes
  int64_t num_rows;
  int64_t dim;
};

// out = pi(pi(scale u + shift) + correction); in float64 and, padded, in float32.
struct Map {
  double scale;
  const double *shift64, *correction64;
  const float *shift, *correction;
  double shift_shift, correction_correction, shift_correction;
  // Of the sums of mapped rows: units in one, of a row's part and of the factors of shift and correction, and the
  // largest factor of `shift` where eight rows' parts fit in an int32.
  double units, shift_units, correction_units, largest_factor;
};

// Maps, and the number of each row's among them; a null `domain` gives all rows the first.
struct MapTable {
  const Map* maps;
  const int64_t* domain;

  const Map& of(int64_t row) const { return maps[domain ? domain[row] : 0]; }
  MapTable from(int64_t row) const { return {maps, domain ? domain + row : nullptr}; }
};

struct BadRows {
  int64_t num_zero = 0;
  int64_t num_nonfinite = 0;
  int64_t first = -1;  // relative to the range
};

// Where unit rows go, less a pilot, as the matrix kernels read them: in panels of `width` columns, each of them row
// after row. Element (i, j) is data[j / width * stride + i * width + j % width]; bad rows are zeros, and elements
// beyond dim up to the end of a vector too.
struct Panels {
  float* data;
  int64_t width, stride;
  const double* pilot;
  const float* minus_pilot;  // padded

  Panels from(int64_t row) const { return {data + row * width, width, stride, pilot, minus_pilot}; }
};

// `scratch` holds dim doubles. `keys` and `projection` (padded) may be null together, `panels` alone.
using MomentsKernel = void (*)(const RowRange&, int64_t* sums, uint64_t* keys, const float* projection,
                               const Panels* panels, double* scratch, BadRows*);
// How many numbers a map's vectors have in a row: sums of mapped rows are longer by them.
constexpr int64_t kNumFactors = 2;

// A mapped row is a u + b shift + c correction. Adds the a u to `sums`, the b to sums[dim] and the c to sums[dim + 1]:
// a row then costs no more than one that is not mapped.
using TransformedMomentsKernel = void (*)(const RowRange&, const Map&, int64_t* sums, double* scratch, BadRows*);
using RowTransformKernel = void (*)(const RowRange&, const MapTable&, char* out, int64_t out_stride, bool nontemporal,
                                    double* scratch, BadRows*);
// The gradient with respect to rows, in their dtype, given that with respect to what the map makes of them; 0 for bad
// rows.
using GradientKernel = void (*)(const RowRange&, const char* grad, int64_t grad_stride, const Map&, char* out,
                                int64_t out_stride, double* scratch);
// So many products are added up in registers, and so many in float32 altogether before they go to float64.
struct SumLengths {
  int64_t in_registers, in_float32;
};

// products[i][j] += sum of row[i] row[j] over rows in panels, for the i and j <= i of one tile of the result.
using ProductsKernel = void (*)(const float* panels, int64_t stride, int64_t num_rows, SumLengths, int64_t tile_row,
                                int64_t tile_column, int64_t dim, double* products);
// out[i] += matrix rows[i], for whole groups of kRowsPerBlock rows; the matrix lies in panels of `panel_width` of its
// rows, column after column. Rows of `out` have whole panels too.
using AffineKernel = void (*)(const float* rows, int64_t row_stride, int64_t num_rows, int64_t dim, const float* matrix,
                              int64_t out_dim, float* out, int64_t out_stride);

// Gaussian noise that depends on the seed and the number of a row alone.
struct Noise {
  double std;  // of an element
  uint64_t seed;
  const int64_t* index;  // numbers of the rows; where null, they count from `first`
  int64_t first;

  int64_t number(int64_t row) const { return index ? index[row] : first + row; }
  Noise from(int64_t row) const { return {std, seed, index ? index + row : nullptr, first + row}; }
};

// Rows of float32 on their way out, as they are, or as pi(row + noise); rows of zeros stay so. `scratch` holds a row.
using WriteKernel = void (*)(const float* rows, int64_t row_stride, int64_t num_rows, int64_t dim, const Noise*,
                             char* out, int64_t out_stride, float* scratch);
using FindBadRowsKernel = void (*)(const RowRange&, double* scratch, BadRows*);

struct KernelTable {
  const char* name;
  MomentsKernel moments[kNumDtypes];
  TransformedMomentsKernel transformed_moments[kNumDtypes];
  RowTransformKernel row_transform[kNumDtypes][kNumDtypes];       // [in][out]
  GradientKernel row_transform_backward[kNumDtypes][kNumDtypes];  // [rows][gradient]
  FindBadRowsKernel find_bad_rows[kNumDtypes];
  int64_t panel_width;
  ProductsKernel products;
  AffineKernel affine;
  WriteKernel write[kNumDtypes];
  uint64_t (*stream_read)(const char* data, int64_t size);
  void (*stream_copy)(const char* source, char* target, int64_t size, bool nontemporal);
};

// The products of a covariance in bfloat16, from panels of that width.
struct FastKernels {
  int64_t panel_width;
  // How much room a panel of so many rows takes as pairs.
  int64_t (*pair_words)(int64_t num_rows);
  // Rows of a panel two by two, rounded: `pairs` has one row for each two of the panel, the first of them in the lower
  // half, and after these what else the kernel wants.
  void (*to_pairs)(const float* panel, int64_t num_rows, uint32_t* pairs);
  // As ProductsKernel, of panels of pairs, `stride` apart; `lengths` counts pairs, and all go to float64 at once.
  void (*products)(const uint32_t* pairs, int64_t stride, int64_t num_pairs, SumLengths lengths, int64_t tile_row,
                   int64_t tile_column, int64_t dim, double* products);
};

// Null where the build lacks the instruction set.
extern const KernelTable* const kBaseline;
extern const KernelTable* const kAvx2;
extern const KernelTable* const kAvx512;
extern const KernelTable* const kNeon;
extern const FastKernels* const kAvx512Bf16;
extern const FastKernels* const kAmx;

}  // namespace realign
