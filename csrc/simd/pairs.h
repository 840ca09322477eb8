// Panels of float32 made rows of pairs of bfloat16, for the AVX-512 of the file that includes this.
#pragma once

#include <immintrin.h>

#include "table.h"

namespace {

constexpr int64_t kWidth = 48;  // the panel width of avx512.cpp, which makes the panels
constexpr int kLanes = 16;
static_assert(realign::kTileSide == kWidth && kWidth == 3 * kLanes);

// Rounded to the nearest bfloat16, in the upper half of each lane.
inline __m512i rounded(const float* at) {
  const __m512i bits = _mm512_castps_si512(_mm512_loadu_ps(at));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  return _mm512_and_si512(up, _mm512_set1_epi32(int32_t(0xffff0000u)));
}

// Two rows of a panel become one row of pairs; after an odd number of rows comes one of zeros.
inline void round_to_pairs(const float* panel, int64_t num_rows, uint32_t* pairs) {
  for (int64_t row = 0; row < num_rows; row += 2, pairs += kWidth)
    for (int64_t j = 0; j < kWidth; j += kLanes) {
      const float* at = panel + row * kWidth + j;
      const __m512i second = row + 1 < num_rows ? rounded(at + kWidth) : _mm512_setzero_si512();
      _mm512_storeu_si512(pairs + j, _mm512_or_si512(_mm512_srli_epi32(rounded(at), 16), second));
    }
}

}  // namespace
