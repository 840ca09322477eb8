// Stands in for the compiler's header, so that csrc/simd/avx512.cpp runs on any processor: SIMDe, and what its older
// versions lack.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace emulated {

template <typename To, typename From>
inline To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(static_cast<void*>(&to), &from, sizeof to);
  return to;
}

template <typename T, int kLanes>
struct Lanes {
  T at[kLanes];
};

// Each lane of a vector of `From`, made a lane of `To`.
template <typename To, typename ToLane, typename FromLane, int kLanes, typename From, typename Convert>
inline To each_lane(const From& from, const Convert& convert) {
  const auto lanes = same_bits<Lanes<FromLane, kLanes>>(from);
  Lanes<ToLane, kLanes> result;
  for (int lane = 0; lane < kLanes; ++lane) result.at[lane] = convert(lanes.at[lane]);
  return same_bits<To>(result);
}

template <typename Lane>
struct Keep {
  template <typename T>
  Lane operator()(T x) const {
    return Lane(x);
  }
};

template <typename Half, typename Whole>
inline Half half_of(const Whole& whole, int which) {
  return same_bits<Lanes<Half, 2>>(whole).at[which];
}

inline __m512 cvtph_ps(__m256i x) {
  return same_bits<__m512>(
      Lanes<__m256, 2>{{simde_mm256_cvtph_ps(half_of<__m128i>(x, 0)), simde_mm256_cvtph_ps(half_of<__m128i>(x, 1))}});
}
inline __m256i cvtps_ph(__m512 x, int) {
  return same_bits<__m256i>(Lanes<__m128i, 2>{
      {simde_mm256_cvtps_ph(half_of<__m256>(x, 0), 0), simde_mm256_cvtps_ph(half_of<__m256>(x, 1), 0)}});
}
inline __m512i cvtepu16_epi32(__m256i x) { return each_lane<__m512i, uint32_t, uint16_t, 16>(x, Keep<uint32_t>()); }
inline __m256i cvtepi32_epi16(__m512i x) { return each_lane<__m256i, uint16_t, uint32_t, 16>(x, Keep<uint16_t>()); }
inline __m512i cvtepi32_epi64(__m256i x) { return each_lane<__m512i, int64_t, int32_t, 8>(x, Keep<int64_t>()); }
inline __m512d cvtps_pd(__m256 x) { return each_lane<__m512d, double, float, 8>(x, Keep<double>()); }
inline __m512i cvtps_epi32(__m512 x) {
  return each_lane<__m512i, int32_t, float, 16>(
      x, [](float lane) { return lane >= -0x1p31f && lane < 0x1p31f ? int32_t(std::nearbyint(lane)) : INT32_MIN; });
}
inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const auto x = same_bits<Lanes<float, 16>>(a), y = same_bits<Lanes<float, 16>>(b);
  auto z = same_bits<Lanes<float, 16>>(c);
  for (int lane = 0; lane < 16; ++lane) z.at[lane] = std::fma(x.at[lane], y.at[lane], z.at[lane]);
  return same_bits<__m512>(z);
}

inline __m512d shuffle_f64x2(__m512d a, __m512d b, int which) {
  const auto x = same_bits<Lanes<__m128d, 4>>(a), y = same_bits<Lanes<__m128d, 4>>(b);
  return same_bits<__m512d>(
      Lanes<__m128d, 4>{{x.at[which & 3], x.at[which >> 2 & 3], y.at[which >> 4 & 3], y.at[which >> 6 & 3]}});
}

// The tile registers, all of the shape that `load_config` demands.
struct Tile {
  uint32_t at[16][16];
};
inline Tile (&tiles())[8] {
  static thread_local Tile registers[8];
  return registers;
}
inline void load_config(const void* config) {
  uint8_t bytes[64];
  std::memcpy(bytes, config, sizeof bytes);
  bool right = bytes[0] == 1 && bytes[1] == 0;
  for (int tile = 0; tile < 8; ++tile)
    right = right && bytes[16 + 2 * tile] == 64 && bytes[17 + 2 * tile] == 0 && bytes[48 + tile] == 16;
  for (int rest = 0; rest < 8; ++rest) right = right && bytes[32 + rest] == 0 && bytes[56 + rest] == 0;
  if (!right) std::abort();
}
inline void tile_load(int tile, const void* from, size_t stride) {
  for (int row = 0; row < 16; ++row)
    std::memcpy(tiles()[tile].at[row], static_cast<const char*>(from) + row * stride, 64);
}
inline void tile_store(int tile, void* to, size_t stride) {
  for (int row = 0; row < 16; ++row) std::memcpy(static_cast<char*>(to) + row * stride, tiles()[tile].at[row], 64);
}
inline void tile_dpbf16ps(int to, int left, int right) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) {
      float sum = same_bits<float>(tiles()[to].at[i][j]);
      for (int k = 0; k < 16; ++k) {
        const uint32_t a = tiles()[left].at[i][k], b = tiles()[right].at[k][j];
        sum += same_bits<float>(a << 16) * same_bits<float>(b << 16);
        sum += same_bits<float>(a & 0xffff0000u) * same_bits<float>(b & 0xffff0000u);
      }
      tiles()[to].at[i][j] = same_bits<uint32_t>(sum);
    }
}

// As the processor does, refuse an address that is not aligned.
template <typename T>
inline void stream(void* to, const T& value) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof value != 0) std::abort();
  std::memcpy(to, &value, sizeof value);
}

}  // namespace emulated

#undef _mm512_cvtph_ps
#undef _mm512_cvtps_ph
#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepi32_epi16
#undef _mm512_cvtepi32_epi64
#undef _mm512_cvtps_pd
#undef _mm512_cvtps_epi32
#undef _mm512_fmadd_ps
#undef _mm512_extractf32x8_ps
#undef _mm512_shuffle_f64x2
#undef _mm512_stream_ps
#undef _mm256_stream_si256
#undef _MM_FROUND_TO_NEAREST_INT
#undef _MM_FROUND_NO_EXC
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtps_ph emulated::cvtps_ph
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_cvtepi32_epi64 emulated::cvtepi32_epi64
#define _mm512_cvtps_pd emulated::cvtps_pd
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_extractf32x8_ps(X, WHICH) emulated::half_of<__m256>(X, WHICH)
#define _mm512_shuffle_f64x2 emulated::shuffle_f64x2
#define _mm512_stream_ps(TO, VALUE) emulated::stream(TO, VALUE)
#define _mm256_stream_si256(TO, VALUE) emulated::stream(TO, VALUE)
#define _MM_FROUND_TO_NEAREST_INT 0
#define _MM_FROUND_NO_EXC 8
#define _tile_loadconfig emulated::load_config
#define _tile_release() (void)0
#define _tile_zero(TILE) emulated::tiles()[TILE] = emulated::Tile()
#define _tile_loadd emulated::tile_load
#define _tile_stored emulated::tile_store
#define _tile_dpbf16ps emulated::tile_dpbf16ps
