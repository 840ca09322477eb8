// Eight lanes: AVX2, FMA and F16C.
#include "simd/types.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace {

constexpr int W = 8;
constexpr int kPanelRows = 4, kPanelVectors = 3;
using F = __m256;
struct I {
  __m256i lanes;
};

inline F zero() { return _mm256_setzero_ps(); }
inline F set1(float x) { return _mm256_set1_ps(x); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline I add(I a, I b) { return {_mm256_add_epi32(a.lanes, b.lanes)}; }

inline F load(const float* x) { return _mm256_loadu_ps(x); }
inline F load(const Half* x) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))); }
inline F load(const Bf16* x) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

inline __m128i to_bits(F value, const Half*) {
  return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline __m128i to_bits(F value, const Bf16*) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i high = _mm256_srli_epi32(rounded, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

inline void store(float* out, F value) { _mm256_storeu_ps(out, value); }
inline void stream(float* out, F value) { _mm256_stream_ps(out, value); }
template <typename T>
inline void store(T* out, F value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), to_bits(value, out));
}
template <typename T>
inline void stream(T* out, F value) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(out), to_bits(value, out));
}
inline void fence() { _mm_sfence(); }

inline double sum_of(F x) {
  const __m256d four =
      _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

// [a, b] of the sums of each half of the lanes.
inline __m256d halves(__m256d a, __m256d b) {
  return _mm256_add_pd(_mm256_permute2f128_pd(a, b, 0x20), _mm256_permute2f128_pd(a, b, 0x31));
}

// What sum_of gives of each, in fewer steps: four of them share the last.
inline void sums_of(const F (&x)[8], double (&sums)[8]) {
  for (int first = 0; first < 8; first += 4) {
    __m256d four[4];
    for (int k = 0; k < 4; ++k)
      four[k] = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(x[first + k])),
                              _mm256_cvtps_pd(_mm256_extractf128_ps(x[first + k], 1)));
    const __m256d a = halves(four[0], four[1]), b = halves(four[2], four[3]);
    const __m256d sum = _mm256_add_pd(_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b));
    _mm256_storeu_pd(sums + first, _mm256_permute4x64_pd(sum, 0xd8));
  }
}

inline I to_int32(F x) { return {_mm256_cvtps_epi32(x)}; }
inline I load_int32(const char* x) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))}; }
inline void add_to_int64(int64_t* sums, I x) {
  __m256i* at = reinterpret_cast<__m256i*>(sums);
  const __m256i low = _mm256_cvtepi32_epi64(_mm256_castsi256_si128(x.lanes));
  const __m256i high = _mm256_cvtepi32_epi64(_mm256_extracti128_si256(x.lanes, 1));
  _mm256_storeu_si256(at, _mm256_add_epi64(_mm256_loadu_si256(at), low));
  _mm256_storeu_si256(at + 1, _mm256_add_epi64(_mm256_loadu_si256(at + 1), high));
}

}  // namespace

#include "simd/body.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace {
const realign::KernelTable kTable = REALIGN_TABLE("avx2");
}

namespace realign {
extern const KernelTable* const kAvx2 = &kTable;
}

#else
namespace realign {
extern const KernelTable* const kAvx2 = nullptr;
}
#endif
