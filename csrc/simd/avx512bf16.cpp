// Dot products of bfloat16, two at a time into float32: AVX512-BF16. Only what the fast covariance needs.
#include "table.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // as in avx512.cpp
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#endif

#include "simd/pairs.h"
#include "simd/tiles.h"

namespace {

using realign::kTileSide;
using realign::SumLengths;

constexpr int kRows = 8;

int64_t pair_words(int64_t num_rows) { return (num_rows + 1) / 2 * kWidth; }

inline __m512bh as_pairs(__m512i x) {
  __m512bh pairs;
  __builtin_memcpy(&pairs, &x, sizeof pairs);
  return pairs;
}

// kRows rows of a tile, in their first kVectors vectors of columns.
template <int kVectors>
void multiply_vectors(const uint32_t* a, const uint32_t* b, int64_t num_pairs, float* tile, bool first) {
  __m512 sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[i][v] = _mm512_setzero_ps();
  for (int64_t k = 0; k < num_pairs; ++k) {
    __m512bh columns[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) columns[v] = as_pairs(_mm512_loadu_si512(b + k * kWidth + v * kLanes));
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const __m512bh x = as_pairs(_mm512_set1_epi32(int32_t(a[k * kWidth + i])));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[i][v] = _mm512_dpbf16_ps(sums[i][v], x, columns[v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* to = tile + i * kTileSide + v * kLanes;
      _mm512_storeu_ps(to, first ? sums[i][v] : _mm512_add_ps(sums[i][v], _mm512_loadu_ps(to)));
    }
}

void products(const uint32_t* pairs, int64_t stride, int64_t num_pairs, SumLengths lengths, int64_t tile_row,
              int64_t tile_column, int64_t dim, double* products) {
  alignas(64) float tile[kTileSide * kTileSide];
  const int64_t first_row = tile_row * kTileSide, first_column = tile_column * kTileSide;
  const uint32_t* a = pairs + tile_row * stride;
  const uint32_t* b = pairs + tile_column * stride;
  for (int64_t begin = 0; begin < num_pairs; begin += lengths.in_registers) {
    const int64_t count = num_pairs - begin < lengths.in_registers ? num_pairs - begin : lengths.in_registers;
    for (int64_t i = 0; i < kTileSide && first_row + i < dim; i += kRows) {
      const int64_t num_columns = first_row + i + kRows - first_column;  // not above the diagonal
      const auto multiply = num_columns <= kLanes       ? multiply_vectors<1>
                            : num_columns <= 2 * kLanes ? multiply_vectors<2>
                                                        : multiply_vectors<3>;
      multiply(a + begin * kWidth + i, b + begin * kWidth, count, tile + i * kTileSide, begin == 0);
    }
  }
  if (num_pairs > 0) add_lower(tile, first_row, first_column, dim, products);
}

}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace {
const realign::FastKernels kKernels = {kWidth, pair_words, round_to_pairs, products};
}

namespace realign {
extern const FastKernels* const kAvx512Bf16 = &kKernels;
}

#else
namespace realign {
extern const FastKernels* const kAvx512Bf16 = nullptr;
}
#endif
