// Four lanes: NEON of 64-bit ARM, where it is part of the architecture.
#include "simd/types.h"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace {

constexpr int W = 4;
constexpr int kPanelRows = 6, kPanelVectors = 3;
using F = float32x4_t;
struct I {
  int32x4_t lanes;
};

inline F zero() { return vdupq_n_f32(0); }
inline F set1(float x) { return vdupq_n_f32(x); }
inline F add(F a, F b) { return vaddq_f32(a, b); }
inline F mul(F a, F b) { return vmulq_f32(a, b); }
inline F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
inline I add(I a, I b) { return {vaddq_s32(a.lanes, b.lanes)}; }

inline F load(const float* x) { return vreinterpretq_f32_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(x))); }
inline uint16x4_t load_bits(const void* x) { return vreinterpret_u16_u8(vld1_u8(static_cast<const uint8_t*>(x))); }
inline void store_bits(void* out, uint16x4_t bits) { vst1_u8(static_cast<uint8_t*>(out), vreinterpret_u8_u16(bits)); }
inline F load(const Half* x) { return vcvt_f32_f16(vreinterpret_f16_u16(load_bits(x))); }
inline F load(const Bf16* x) { return vreinterpretq_f32_u32(vshll_n_u16(load_bits(x), 16)); }

inline void store(float* out, F value) { vst1q_u8(reinterpret_cast<uint8_t*>(out), vreinterpretq_u8_f32(value)); }
inline void store(Half* out, F value) { store_bits(out, vreinterpret_u16_f16(vcvt_f16_f32(value))); }
inline void store(Bf16* out, F value) {
  const uint32x4_t bits = vreinterpretq_u32_f32(value);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  store_bits(out, vshrn_n_u32(vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd), 16));
}
// The processors of this architecture find streams of whole lines themselves.
template <typename T>
inline void stream(T* out, F value) {
  store(out, value);
}
inline void fence() {}

inline double sum_of(F x) { return vaddvq_f64(vaddq_f64(vcvt_f64_f32(vget_low_f32(x)), vcvt_high_f64_f32(x))); }
inline I to_int32(F x) { return {vcvtnq_s32_f32(x)}; }
inline I load_int32(const char* x) { return {vreinterpretq_s32_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(x)))}; }
inline void add_to_int64(int64_t* sums, I x) {
  vst1q_s64(sums, vaddw_s32(vld1q_s64(sums), vget_low_s32(x.lanes)));
  vst1q_s64(sums + 2, vaddw_high_s32(vld1q_s64(sums + 2), x.lanes));
}

}  // namespace

#include "simd/body.h"

namespace {
const realign::KernelTable kTable = REALIGN_TABLE("neon");
}

namespace realign {
extern const KernelTable* const kNeon = &kTable;
}

#else
namespace realign {
extern const KernelTable* const kNeon = nullptr;
}
#endif
