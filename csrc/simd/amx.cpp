// Dot products of bfloat16 in the matrix unit: AMX. Only what the fast covariance needs.
#include "table.h"

#if defined(__x86_64__) && defined(__linux__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // as in avx512.cpp
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,amx-tile,amx-bf16"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,amx-tile,amx-bf16")
#endif

#include "simd/pairs.h"
#include "simd/tiles.h"

namespace {

using realign::kTileSide;
using realign::SumLengths;

// A tile register holds 16 rows of 16 words. One of a product's left side wants them transposed.
constexpr int64_t kSide = 16, kSideWords = kSide * kSide;

int64_t padded(int64_t num_pairs) { return (num_pairs + kSide - 1) / kSide * kSide; }

// The rows of pairs, zeros after the last, and behind them the same transposed: 16 pairs of 16 columns after the other.
int64_t pair_words(int64_t num_rows) { return 2 * kWidth * padded((num_rows + 1) / 2); }

// Vectors `distance` apart exchange the lanes in which they do not belong.
inline void exchange(__m512i* x, int distance) {
  alignas(64) int32_t low[kLanes], high[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    low[lane] = lane & distance ? kLanes + lane - distance : lane;
    high[lane] = lane & distance ? kLanes + lane : lane + distance;
  }
  const __m512i to_low = _mm512_load_si512(low), to_high = _mm512_load_si512(high);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & distance)) {
      const __m512i first = x[i], second = x[i + distance];
      x[i] = _mm512_permutex2var_epi32(first, to_low, second);
      x[i + distance] = _mm512_permutex2var_epi32(first, to_high, second);
    }
}

inline void transpose(const uint32_t* from, uint32_t* to) {
  __m512i x[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) x[i] = _mm512_loadu_si512(from + i * kWidth);
  exchange(x, 8);
  exchange(x, 4);
  exchange(x, 2);
  exchange(x, 1);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) _mm512_storeu_si512(to + i * kLanes, x[i]);
}

void to_pairs(const float* panel, int64_t num_rows, uint32_t* pairs) {
  const int64_t num_pairs = (num_rows + 1) / 2, num_padded = padded(num_pairs);
  round_to_pairs(panel, num_rows, pairs);
  __builtin_memset(pairs + num_pairs * kWidth, 0, size_t((num_padded - num_pairs) * kWidth) * sizeof *pairs);
  uint32_t* to = pairs + num_padded * kWidth;
  for (int64_t pair = 0; pair < num_padded; pair += kSide)
    for (int64_t j = 0; j < kWidth; j += kSide, to += kSideWords) transpose(pairs + pair * kWidth + j, to);
}

// All tile registers have 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t num_rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

// 48 x 16 of a tile: its columns from `b` on. Names of tile registers are part of an instruction, hence no loop.
inline void multiply_columns(const uint32_t* a, const uint32_t* b, int64_t num_pairs, float* tile) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  for (int64_t pair = 0; pair < num_pairs; pair += kSide) {
    const uint32_t* const left = a + pair * kWidth;
    _tile_loadd(6, b + pair * kWidth, kWidth * sizeof(uint32_t));
    _tile_loadd(3, left, kSide * sizeof(uint32_t));
    _tile_dpbf16ps(0, 3, 6);
    _tile_loadd(4, left + kSideWords, kSide * sizeof(uint32_t));
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(5, left + 2 * kSideWords, kSide * sizeof(uint32_t));
    _tile_dpbf16ps(2, 5, 6);
  }
  _tile_stored(0, tile, kTileSide * sizeof(float));
  _tile_stored(1, tile + kSide * kTileSide, kTileSide * sizeof(float));
  _tile_stored(2, tile + 2 * kSide * kTileSide, kTileSide * sizeof(float));
}

void products(const uint32_t* pairs, int64_t stride, int64_t num_pairs, SumLengths lengths, int64_t tile_row,
              int64_t tile_column, int64_t dim, double* products) {
  alignas(64) float tile[kTileSide * kTileSide], sums[kTileSide * kTileSide];
  const int64_t num_padded = padded(num_pairs), at_once = padded(lengths.in_registers);
  const uint32_t* a = pairs + tile_row * stride + num_padded * kWidth;
  const uint32_t* b = pairs + tile_column * stride;
  const TileConfig config;
  _tile_loadconfig(&config);
  for (int64_t begin = 0; begin < num_padded; begin += at_once) {
    const int64_t count = num_padded - begin < at_once ? num_padded - begin : at_once;
    float* const to = begin == 0 ? tile : sums;
    for (int64_t j = 0; j < kTileSide; j += kSide)
      multiply_columns(a + begin * kWidth, b + begin * kWidth + j, count, to + j);
    for (int64_t k = 0; begin > 0 && k < kTileSide * kTileSide; ++k) tile[k] += sums[k];
  }
  _tile_release();
  if (num_pairs > 0) add_lower(tile, tile_row * kTileSide, tile_column * kTileSide, dim, products);
}

}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace {
const realign::FastKernels kKernels = {kWidth, pair_words, to_pairs, products};

}  // namespace

namespace realign {
extern const FastKernels* const kAmx = &kKernels;
}

#else
namespace realign {
extern const FastKernels* const kAmx = nullptr;
}
#endif
