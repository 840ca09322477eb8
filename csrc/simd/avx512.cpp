// Sixteen lanes: AVX-512 F, BW, DQ and VL.
#include "simd/types.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own headers start some results from an undefined register and warn of it (its bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

namespace {

constexpr int W = 16;
constexpr int kPanelRows = 8, kPanelVectors = 3;
using F = __m512;
struct I {
  __m512i lanes;
};

inline F zero() { return _mm512_setzero_ps(); }
inline F set1(float x) { return _mm512_set1_ps(x); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline I add(I a, I b) { return {_mm512_add_epi32(a.lanes, b.lanes)}; }

inline F load(const float* x) { return _mm512_loadu_ps(x); }
inline F load(const Half* x) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))); }
inline F load(const Bf16* x) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

inline __m256i to_bits(F value, const Half*) {
  return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline __m256i to_bits(F value, const Bf16*) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

inline void store(float* out, F value) { _mm512_storeu_ps(out, value); }
inline void stream(float* out, F value) { _mm512_stream_ps(out, value); }
template <typename T>
inline void store(T* out, F value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), to_bits(value, out));
}
template <typename T>
inline void stream(T* out, F value) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(out), to_bits(value, out));
}
inline void fence() { _mm_sfence(); }

inline double sum_of(F x) {
  const __m512d eight =
      _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(x)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
  const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd(eight, 1));
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}
// Each as sum_of would, but eight in the steps of one: halves that are to be added meet in one vector.
inline void sums_of(const F (&x)[8], double (&sums)[8]) {
  __m512d lanes[8], halves[4], quarters[2];
  for (int k = 0; k < 8; ++k)
    lanes[k] =
        _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(x[k])), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x[k], 1)));
  for (int k = 0; k < 4; ++k)
    halves[k] = _mm512_add_pd(_mm512_shuffle_f64x2(lanes[2 * k], lanes[2 * k + 1], 0x44),
                              _mm512_shuffle_f64x2(lanes[2 * k], lanes[2 * k + 1], 0xee));
  for (int k = 0; k < 2; ++k)
    quarters[k] = _mm512_add_pd(_mm512_shuffle_f64x2(halves[2 * k], halves[2 * k + 1], 0x88),
                                _mm512_shuffle_f64x2(halves[2 * k], halves[2 * k + 1], 0xdd));
  const __m512d mixed =
      _mm512_add_pd(_mm512_unpacklo_pd(quarters[0], quarters[1]), _mm512_unpackhi_pd(quarters[0], quarters[1]));
  _mm512_storeu_pd(sums, _mm512_permutexvar_pd(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), mixed));
}
inline I to_int32(F x) { return {_mm512_cvtps_epi32(x)}; }
inline I load_int32(const char* x) { return {_mm512_loadu_si512(x)}; }
inline void add_to_int64(int64_t* sums, I x) {
  const __m512i low = _mm512_cvtepi32_epi64(_mm512_castsi512_si256(x.lanes));
  const __m512i high = _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(x.lanes, 1));
  _mm512_storeu_si512(sums, _mm512_add_epi64(_mm512_loadu_si512(sums), low));
  _mm512_storeu_si512(sums + 8, _mm512_add_epi64(_mm512_loadu_si512(sums + 8), high));
}

}  // namespace

#include "simd/body.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace {
const realign::KernelTable kTable = REALIGN_TABLE("avx512");
}

namespace realign {
extern const KernelTable* const kAvx512 = &kTable;
}

#else
namespace realign {
extern const KernelTable* const kAvx512 = nullptr;
}
#endif
