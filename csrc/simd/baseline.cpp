// Four lanes in the compilers' portable vectors: whatever processor the build is for.
#include "simd/types.h"

namespace {

constexpr int W = 4;
constexpr int kPanelRows = 4, kPanelVectors = 2;
typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
typedef uint32_t U __attribute__((vector_size(16)));
typedef uint16_t U16 __attribute__((vector_size(8)));

inline F zero() { return F{}; }
inline F set1(float x) { return F{x, x, x, x}; }
inline F add(F a, F b) { return a + b; }
inline F mul(F a, F b) { return a * b; }
inline F fma(F a, F b, F c) { return a * b + c; }
inline I add(I a, I b) { return I(U(a) + U(b)); }  // as the instruction sets do, it wraps
inline U pick(I mask, U a, U b) { return (U(mask) & a) | (~U(mask) & b); }

inline F load(const float* x) {
  F value;
  __builtin_memcpy(&value, x, sizeof value);
  return value;
}
inline void store(float* out, F value) { __builtin_memcpy(out, &value, sizeof value); }

inline U load_bits(const void* x) {
  U16 narrow;
  __builtin_memcpy(&narrow, x, sizeof narrow);
  return __builtin_convertvector(narrow, U);
}
inline void store_bits(void* out, U bits) {
  const U16 narrow = __builtin_convertvector(bits, U16);
  __builtin_memcpy(out, &narrow, sizeof narrow);
}

inline F load(const Bf16* x) { return F(load_bits(x) << 16); }
inline void store(Bf16* out, F value) {
  const U bits = U(value);
  store_bits(out, (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline F load(const Half* x) {
  const U bits = load_bits(x);
  const U magnitude = (bits & 0x7fff) << 13;
  // A float whose exponent is 112 too small; the product puts it right, for subnormal halves too.
  U value = U(F(magnitude) * set1(0x1p112f));
  value |= U(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
  return F(value | ((bits & 0x8000) << 16));
}
inline void store(Half* out, F value) {
  const U bits = U(value), magnitude = bits & 0x7fffffffu;
  const U normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1)) >> 13;
  // Beside 0.5 the last place of a float is that of a subnormal half: the addition rounds.
  const U subnormal = U(F(magnitude) + set1(0.5f)) - 0x3f000000u;
  U half = pick(magnitude < 0x38800000u, subnormal, normal);
  half = pick(magnitude >= 0x477ff000u, U{} + 0x7c00u, half);
  store_bits(out, half | ((bits >> 16) & 0x8000));
}

inline double sum_of(F x) { return (double(x[0]) + double(x[2])) + (double(x[1]) + double(x[3])); }
// To the nearest integer, ties to even: beyond 2^23 a float is whole already.
inline I to_int32(F x) {
  const F sign_and_half = F((U(x) & 0x80000000u) | 0x4b000000u);  // 2^23 with the sign of x
  const F rounded = (x + sign_and_half) - sign_and_half;
  const I small = (U(x) & 0x7fffffffu) < 0x4b000000u;
  return __builtin_convertvector(F(pick(small, U(rounded), U(x))), I);
}
inline I load_int32(const char* x) {
  I value;
  __builtin_memcpy(&value, x, sizeof value);
  return value;
}
inline void add_to_int64(int64_t* sums, I x) {
  for (int lane = 0; lane < W; ++lane) sums[lane] += x[lane];
}

template <typename T>
inline void stream(T* out, F value) {
  store(out, value);
}
inline void fence() {}

}  // namespace

#include "simd/body.h"

namespace {
const realign::KernelTable kTable = REALIGN_TABLE("baseline");
}

namespace realign {
extern const KernelTable* const kBaseline = &kTable;
}
