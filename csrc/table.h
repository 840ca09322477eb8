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

// `scratch` holds dim doubles. `keys` and `projection` (padded) may be null together.
using MomentsKernel = void (*)(const RowRange&, int64_t* sums, uint64_t* keys, const float* projection, double* scratch,
                               BadRows*);
using TransformedMomentsKernel = void (*)(const RowRange&, const Map&, int64_t* sums, double* scratch, BadRows*);
using RowTransformKernel = void (*)(const RowRange&, const MapTable&, char* out, int64_t out_stride, bool nontemporal,
                                    double* scratch, BadRows*);
// The gradient with respect to rows, in their dtype, given that with respect to what the map makes of them; 0 for bad
// rows.
using GradientKernel = void (*)(const RowRange&, const char* grad, int64_t grad_stride, const Map&, char* out,
                                int64_t out_stride, double* scratch);
using FindBadRowsKernel = void (*)(const RowRange&, double* scratch, BadRows*);

struct KernelTable {
  const char* name;
  MomentsKernel moments[kNumDtypes];
  TransformedMomentsKernel transformed_moments[kNumDtypes];
  RowTransformKernel row_transform[kNumDtypes][kNumDtypes];       // [in][out]
  GradientKernel row_transform_backward[kNumDtypes][kNumDtypes];  // [rows][gradient]
  FindBadRowsKernel find_bad_rows[kNumDtypes];
  uint64_t (*stream_read)(const char* data, int64_t size);
  void (*stream_copy)(const char* source, char* target, int64_t size, bool nontemporal);
};

// Null where the build lacks the instruction set.
extern const KernelTable* const kBaseline;
extern const KernelTable* const kAvx2;
extern const KernelTable* const kAvx512;
extern const KernelTable* const kNeon;

}  // namespace realign
