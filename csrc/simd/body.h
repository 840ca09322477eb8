// The kernels, written once over the vector type of the file that includes this.
//
// That file has defined, in an anonymous namespace: `W` (lanes), `kPanelRows` and `kPanelVectors` (what the registers
// hold of a product of matrices), `F` (W floats), `I` (W int32), the row types `Half`
// and `Bf16`, and zero, set1, add, fma, mul, load, store, stream, to_int32, add(I, I), add_to_int64, fence. Everything
// here is in an anonymous namespace too and uses no template or inline function of the standard library: the linker may
// merge such functions between files, and the baseline would then run instructions that its processor lacks.

#include "simd/tiles.h"

namespace {

using realign::BadRows;
using realign::kRowsPerBlock;
using realign::kTileSide;
using realign::Map;
using realign::MapTable;
using realign::Noise;
using realign::Panels;
using realign::RowRange;
using realign::SumLengths;

// Columns of a panel: those that the matrix kernels keep in registers at once, for kPanelRows rows of the result.
constexpr int kPanelWidth = kPanelVectors * W;
static_assert(kTileSide % kPanelWidth == 0 && kTileSide % kPanelRows == 0 && kPanelWidth % kPanelRows == 0);

constexpr double kUnits = double(int64_t(1) << realign::kFixedPointBits);

// Squares of float32 values are exact enough between these, and neither overflow nor vanish.
constexpr double kSmallestSquare = 1e-28, kLargestSquare = 1e30;
// Below this dimension, and for squared norms below this, the fused float32 form loses digits.
constexpr int64_t kSmallestFusedDim = 64;
constexpr double kSmallestFusedSquare = 0.25;
// How far before its use memory is asked for: enough to cover its latency, little enough for a cache of the second
// level.
constexpr int64_t kAheadBytes = 48 << 10;
constexpr int64_t kLineBytes = 64;

template <typename T>
inline const T* row_at(const RowRange& rows, int64_t index) {
  return reinterpret_cast<const T*>(rows.data + index * rows.stride);
}

template <typename T>
inline void copy_first(const T* x, int64_t count, T (&padded)[W]) {
  __builtin_memset(padded, 0, sizeof padded);
  __builtin_memcpy(padded, x, size_t(count) * sizeof(T));
}

template <typename T>
inline F load_first(const T* x, int64_t count) {
  T padded[W];
  copy_first(x, count, padded);
  return load(padded);
}

template <typename T>
inline void store_first(T* out, int64_t count, F value) {
  T padded[W];
  store(padded, value);
  __builtin_memcpy(out, padded, size_t(count) * sizeof(T));
}

// Asks for what a later block will read, evenly over both sweeps over this one: the processor would make room for a
// burst of requests by holding up the arithmetic, and between bursts the memory would rest. Two lines at once are a
// burst already (a quarter of the speed), and the compiler would gather them: so each request is tied to the vector
// just loaded. That it says nothing of memory lets what the loop needs stay in registers (a tenth of the speed).
struct Ahead {
  const char* at;

  // After the load of vector `index` of the kVectors, each of kBytes, that one step of an unrolled loop reads: half of
  // their lines are asked for, each once.
  template <int kVectors, int64_t kBytes>
  inline void vector(int index, F& loaded) const {
    constexpr int64_t kSpacing = 2 * kLineBytes;
    if (index * kBytes % kSpacing != 0) return;
    const char* const line = at + index * kBytes / 2;
    if (kVectors * kBytes < kSpacing &&
        reinterpret_cast<uintptr_t>(line) % kLineBytes >= uintptr_t(kVectors * kBytes / 2))
      return;
#if defined(__x86_64__) && !defined(REALIGN_EMULATED)  // no register holds a vector that is emulated
    asm volatile("prefetcht1 %1" : "+v"(loaded) : "m"(*line));
#else
    (void)loaded;
    __builtin_prefetch(line, 0, 2);
#endif
  }
  template <int kVectors, int64_t kBytes>
  inline void step() {
    at += kVectors * kBytes / 2;
  }
};

// The sums of a block's rows over all lanes. A file may know a better way for its own vectors.
template <typename Vector>
inline void sums_of(const Vector (&x)[kRowsPerBlock], double (&sums)[kRowsPerBlock]) {
  for (int k = 0; k < kRowsPerBlock; ++k) sums[k] = sum_of(x[k]);
}

// Inner products of the rows of a block, lane by lane and then summed: [0] of each with itself, [k] with the vector
// k - 1.
template <int K>
using Lanes = F[K + 1][kRowsPerBlock];

template <int K>
inline void sum_lanes(Lanes<K>& lanes, int count, double (*products)[kRowsPerBlock]) {
  for (int k = 0; k <= K; ++k) {
    for (int r = count; r < kRowsPerBlock; ++r) lanes[k][r] = zero();
    sums_of(lanes[k], products[k]);
  }
}

// As many as the registers of AVX2 hold, for rows one by one and two by two.
constexpr int kSumsOfOne = 4, kSumsOfTwo = 2;

// out[.][first + r], of row r; the v are padded. Rows taken together share the loads of the v, and each is summed as it
// would be alone. kSums sums each, so that no addition waits for the one before.
template <int K, int kSums, int kRows, typename T>
inline void dots(const T* const (&x)[kRows], const float* const* v, int64_t dim, Lanes<K>& out, int first,
                 Ahead* ahead) {
  constexpr int64_t kVectorBytes = W * sizeof(T);
  // Copied first: a call among the sums would take them out of their registers, in the loop too.
  const int64_t whole = dim / W * W;
  T last[kRows][W];
  if (whole < dim)
    for (int r = 0; r < kRows; ++r) copy_first(x[r] + whole, dim - whole, last[r]);
  F sums[kRows][kSums][K + 1];
  for (int r = 0; r < kRows; ++r)
    for (int i = 0; i < kSums; ++i)
      for (int k = 0; k <= K; ++k) sums[r][i][k] = zero();
  int64_t j = 0;
  for (; j + kSums * W <= dim; j += kSums * W) {
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) {
      const int64_t at = j + i * W;
      F vectors[K + 1];
#pragma GCC unroll 2
      for (int k = 0; k < K; ++k) vectors[k] = load(v[k] + at);
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        F a = load(x[r] + at);
        if (ahead) ahead->template vector<kRows * kSums, kVectorBytes>(i * kRows + r, a);
        sums[r][i][0] = fma(a, a, sums[r][i][0]);
#pragma GCC unroll 2
        for (int k = 0; k < K; ++k) sums[r][i][k + 1] = fma(a, vectors[k], sums[r][i][k + 1]);
      }
    }
    if (ahead) ahead->template step<kRows * kSums, kVectorBytes>();
  }
  for (; j < dim; j += W)
    for (int r = 0; r < kRows; ++r) {
      const F a = load(j < whole ? x[r] + j : last[r]);
      sums[r][0][0] = fma(a, a, sums[r][0][0]);
      for (int k = 0; k < K; ++k) sums[r][0][k + 1] = fma(a, load(v[k] + j), sums[r][0][k + 1]);
    }
  for (int r = 0; r < kRows; ++r)
    for (int k = 0; k <= K; ++k) {
      F sum = add(sums[r][0][k], sums[r][1][k]);
      if (kSums == 4) sum = add(sum, add(sums[r][kSums - 2][k], sums[r][kSums - 1][k]));
      out[k][first + r] = sum;
    }
}

// A loop of its own, which the compiler turns into vectors; with more in it, it does not.
inline void inverse_roots(const double (&x)[kRowsPerBlock], double (&roots)[kRowsPerBlock]) {
  for (int k = 0; k < kRowsPerBlock; ++k) roots[k] = 1 / __builtin_sqrt(x[k]);
}

template <typename T>
inline double square_of(const T* x, int64_t dim) {
  const T* const rows[] = {x};
  Lanes<0> square;
  dots<0, kSumsOfOne>(rows, nullptr, dim, square, 0, nullptr);
  return sum_of(square[0][0]);
}

inline bool fits_float32(double square) { return square > kSmallestSquare && square < kLargestSquare; }

// ---- The long way, in float64 -------------------------------------------------------------------------------------

inline double to_double(double x) { return x; }
inline double to_double(float x) { return double(x); }
inline double to_double(Half x) {
  const Half padded[W] = {x};
  float lanes[W];
  store(lanes, load(padded));
  return double(lanes[0]);
}
inline double to_double(Bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return double(value);
}

inline void from_double(double x, double* out) { *out = x; }
inline void from_double(double x, float* out) { *out = float(x); }
template <typename T>
inline void from_double(double x, T* out) {
  store_first(out, 1, set1(float(x)));
}

// Eight sums side by side, so that the compiler may keep them in registers and the order is the same everywhere.
inline double square_of(const double* x, int64_t dim) {
  double sums[8] = {};
  int64_t j = 0;
  for (; j + 8 <= dim; j += 8)
    for (int lane = 0; lane < 8; ++lane) sums[lane] += x[j + lane] * x[j + lane];
  for (int lane = 0; j < dim; ++j, ++lane) sums[lane] += x[j] * x[j];
  return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

inline void project(double* x, int64_t dim) {
  const double square = square_of(x, dim);
  if (square == 0) return;  // pi(0) = 0
  const double factor = 1 / __builtin_sqrt(square);
  for (int64_t j = 0; j < dim; ++j) x[j] *= factor;
}

enum RowKind { kGood, kZero, kNonfinite };

// unit = pi(x), whatever the magnitude of x.
template <typename T>
inline RowKind unit_row(const T* x, int64_t dim, double* unit) {
  double largest = 0;
  bool finite = true;
  for (int64_t j = 0; j < dim; ++j) {
    T element;
    __builtin_memcpy(&element, x + j, sizeof element);
    unit[j] = to_double(element);
    const double magnitude = __builtin_fabs(unit[j]);
    finite &= magnitude <= 1.7976931348623157e308;
    largest = magnitude > largest ? magnitude : largest;
  }
  if (!finite) return kNonfinite;
  if (largest == 0) return kZero;
  if (largest < 1e-140 || largest > 1e140) {
    // Twice, since the reciprocal of a subnormal number overflows.
    const double step = largest < 1 ? 0x1p500 : 0x1p-500;
    for (int64_t j = 0; j < dim; ++j) unit[j] *= step;
    largest *= step;
    for (int64_t j = 0; j < dim; ++j) unit[j] /= largest;
  }
  project(unit, dim);
  return kGood;
}

inline void map_unit_row(const Map& map, int64_t dim, double* row) {
  for (int64_t j = 0; j < dim; ++j) row[j] = map.scale * row[j] + map.shift64[j];
  project(row, dim);
  for (int64_t j = 0; j < dim; ++j) row[j] += map.correction64[j];
  project(row, dim);
}

inline void count_bad(RowKind kind, int64_t index, BadRows* bad) {
  if (kind == kGood) return;
  ++(kind == kZero ? bad->num_zero : bad->num_nonfinite);
  if (bad->first < 0) bad->first = index;
}

inline void add_row(const double* row, int64_t dim, double units, int64_t* sums) {
  for (int64_t j = 0; j < dim; ++j) sums[j] += int64_t(__builtin_rint(row[j] * units));
}

inline int block_size(const RowRange& rows, int64_t first) {
  return int(rows.num_rows - first < kRowsPerBlock ? rows.num_rows - first : kRowsPerBlock);
}

inline Ahead ahead_of(const RowRange& rows, int64_t first) { return {rows.data + first * rows.stride + kAheadBytes}; }

// ---- Moments ------------------------------------------------------------------------------------------------------

inline uint64_t mix(uint64_t x) {
  x ^= x >> 30;
  x *= 0xbf58476d1ce4e5b9u;
  x ^= x >> 27;
  x *= 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

inline uint64_t bits_of(double x) {
  uint64_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline uint64_t key_of(double square, double projected) {
  const uint64_t key = mix(bits_of(projected) + 0x9e3779b97f4a7c15u * bits_of(square));
  return key ? key : 1;
}

// A block of rows that take the fused form, and how each is to be scaled to fixed point.
template <typename T>
struct Block {
  const T* rows[kRowsPerBlock];
  int64_t index[kRowsPerBlock];
  float factor[kRowsPerBlock];
  int count = 0;
};

// What else becomes of the values of a block, in fixed point: nothing.
struct Nowhere {
  static inline void put(F, int64_t, int64_t) {}
};

// Or unit rows less the pilot, to panels.
struct ToPanels {
  const Panels& panels;

  float* at(int64_t row, int64_t j) const {
    return panels.data + j / panels.width * panels.stride + row * panels.width + j % panels.width;
  }
  inline void put(F value, int64_t row, int64_t j) const {
    store(at(row, j), fma(value, set1(float(1 / kUnits)), load(panels.minus_pilot + j)));
  }
};

template <int kCount, typename T, typename To>
inline void add_columns(const Block<T>& given_block, const To& to, int64_t dim, int64_t* sums, Ahead ahead) {
  const Block<T> block = given_block;  // its own, so that no store to the sums can be thought to change it
  const int count = kCount ? kCount : block.count;
  int64_t j = 0;
  for (; j + W <= dim; j += W) {
    const auto fixed_of = [&](int k) {
      F x = load(block.rows[k] + j);
      ahead.template vector<kCount, W * sizeof(T)>(k, x);
      const F value = mul(x, set1(block.factor[k]));
      to.put(value, block.index[k], j);
      return to_int32(value);
    };
    I sum = fixed_of(0);
#pragma GCC unroll 8
    for (int k = 1; k < count; ++k) sum = add(sum, fixed_of(k));
    add_to_int64(sums + j, sum);
    ahead.template step<kCount, W * sizeof(T)>();
  }
  if (j < dim) {
    int64_t last[W] = {};
    for (int k = 0; k < count; ++k) {
      const F value = mul(load_first(block.rows[k] + j, dim - j), set1(block.factor[k]));
      to.put(value, block.index[k], j);
      add_to_int64(last, to_int32(value));
    }
    for (int64_t rest = j; rest < dim; ++rest) sums[rest] += last[rest - j];
  }
}

template <typename T, typename To>
inline void add_block(const Block<T>& block, const To& to, int64_t dim, int64_t* sums, Ahead ahead) {
  // A full block has a constant trip count, so that the loop over its rows unrolls.
  if (block.count == kRowsPerBlock)
    add_columns<kRowsPerBlock>(block, to, dim, sums, ahead);
  else if (block.count > 0)
    add_columns<0>(block, to, dim, sums, ahead);
}

inline double key_projection(const double* row, const float* projection, int64_t dim) {
  double sum = 0;
  for (int64_t j = 0; j < dim; ++j) sum += row[j] * double(projection[j]);
  return sum;
}

// A row that took the long way: `unit` is pi(row), or whatever where the row is bad.
inline void put_long(const Nowhere&, const double*, RowKind, int64_t, int64_t) {}
inline void put_long(const ToPanels& to, const double* unit, RowKind kind, int64_t row, int64_t dim) {
  for (int64_t j = 0; j < dim; j += W)
    for (int64_t k = j; k < j + W; ++k)
      *to.at(row, k) = kind == kGood && k < dim ? float(unit[k] - to.panels.pilot[k]) : 0;
}

template <typename T, typename To>
inline void moments_to(const To& to, const RowRange& rows, int64_t* sums, uint64_t* keys, const float* projection,
                       double* scratch, BadRows* bad) {
  for (int64_t first = 0; first < rows.num_rows; first += kRowsPerBlock) {
    const int count = block_size(rows, first);
    // All products before all square roots: so the processor waits for neither.
    Lanes<0> squares;
    Lanes<1> products;
    Ahead ahead = ahead_of(rows, first);
    for (int k = 0; k < count; ++k) {
      const T* const x[] = {row_at<T>(rows, first + k)};
      if (keys)
        dots<1, kSumsOfOne>(x, &projection, rows.dim, products, k, &ahead);
      else
        dots<0, kSumsOfOne>(x, nullptr, rows.dim, squares, k, &ahead);
    }
    double found[2][kRowsPerBlock];
    if (keys)
      sum_lanes<1>(products, count, found);
    else
      sum_lanes<0>(squares, count, found);
    double inverse[kRowsPerBlock];
    inverse_roots(found[0], inverse);
    Block<T> block;
    for (int k = 0; k < count; ++k) {
      const int64_t i = first + k;
      const T* x = row_at<T>(rows, i);
      const double square = found[0][k];
      if (fits_float32(square)) {
        block.rows[block.count] = x;
        block.index[block.count] = i;
        block.factor[block.count++] = float(kUnits * inverse[k]);
        if (keys) keys[i] = key_of(square, found[1][k]);
        continue;
      }
      const RowKind kind = unit_row(x, rows.dim, scratch);
      count_bad(kind, i, bad);
      if (kind == kGood) add_row(scratch, rows.dim, kUnits, sums);
      if (keys) keys[i] = kind == kGood ? key_of(0, key_projection(scratch, projection, rows.dim)) : 0;
      put_long(to, scratch, kind, i, rows.dim);
    }
    add_block(block, to, rows.dim, sums, ahead);
  }
}

template <typename To>
inline void moments_long_to(const To& to, const RowRange& rows, int64_t* sums, uint64_t* keys, const float* projection,
                            double* scratch, BadRows* bad) {
  for (int64_t i = 0; i < rows.num_rows; ++i) {
    const RowKind kind = unit_row(row_at<double>(rows, i), rows.dim, scratch);
    count_bad(kind, i, bad);
    if (kind == kGood) add_row(scratch, rows.dim, kUnits, sums);
    if (keys) keys[i] = kind == kGood ? key_of(0, key_projection(scratch, projection, rows.dim)) : 0;
    put_long(to, scratch, kind, i, rows.dim);
  }
}

template <typename T>
void moments(const RowRange& rows, int64_t* sums, uint64_t* keys, const float* projection, const Panels* panels,
             double* scratch, BadRows* bad) {
  const auto run = [&](const auto& to) {
    if constexpr (sizeof(T) == sizeof(double))
      moments_long_to(to, rows, sums, keys, projection, scratch, bad);
    else
      moments_to<T>(to, rows, sums, keys, projection, scratch, bad);
  };
  if (panels)
    run(ToPanels{*panels});
  else
    run(Nowhere());
}

// ---- The fused map ------------------------------------------------------------------------------------------------

// The factors of row, shift and correction in the outputs of a block, side by side: independent of each other, their
// square roots and divisions run at the processor's rate and not one after the other.
struct Factors {
  double row[kRowsPerBlock], shift[kRowsPerBlock], correction[kRowsPerBlock];
  bool fused[kRowsPerBlock];  // false where the row must go the long way
};

// With K = 1 for maps without a correction, and the same bits.
template <int K, typename T>
inline Factors factors_of(const RowRange& rows, int64_t first, int count, const MapTable& maps, Ahead* ahead) {
  Lanes<K> lanes;
  double scale[kRowsPerBlock], shift_squares[kRowsPerBlock], correction_squares[kRowsPerBlock], mixed[kRowsPerBlock];
  for (int k = 0; k < kRowsPerBlock; ++k) {
    const Map& map = maps.of(first + (k < count ? k : 0));
    scale[k] = map.scale;
    shift_squares[k] = map.shift_shift;
    correction_squares[k] = map.correction_correction;
    mixed[k] = map.shift_correction;
  }
  for (int k = 0; k < count;) {
    const Map& map = maps.of(first + k);
    const float* const vectors[2] = {map.shift, map.correction};
    if (k + 1 < count && &maps.of(first + k + 1) == &map) {
      const T* const x[] = {row_at<T>(rows, first + k), row_at<T>(rows, first + k + 1)};
      dots<K, kSumsOfTwo>(x, vectors, rows.dim, lanes, k, ahead);
      k += 2;
    } else {
      const T* const x[] = {row_at<T>(rows, first + k)};
      dots<K, kSumsOfTwo>(x, vectors, rows.dim, lanes, k, ahead);
      ++k;
    }
  }
  double products[K + 1][kRowsPerBlock];
  sum_lanes<K>(lanes, count, products);
  Factors factors;
  double inverse[kRowsPerBlock], inverse1[kRowsPerBlock], inverse2[kRowsPerBlock];
  double square1[kRowsPerBlock], square2[kRowsPerBlock];
  inverse_roots(products[0], inverse);
  for (int k = 0; k < kRowsPerBlock; ++k)
    square1[k] = scale[k] * scale[k] + 2 * scale[k] * inverse[k] * products[1][k] + shift_squares[k];
  inverse_roots(square1, inverse1);
  if constexpr (K == 2) {
    for (int k = 0; k < kRowsPerBlock; ++k)
      square2[k] = 1 + 2 * (scale[k] * inverse[k] * products[2][k] + mixed[k]) * inverse1[k] + correction_squares[k];
    inverse_roots(square2, inverse2);
  } else {
    for (int k = 0; k < kRowsPerBlock; ++k) square2[k] = inverse2[k] = 1;
  }
  for (int k = 0; k < kRowsPerBlock; ++k) {
    factors.row[k] = scale[k] * inverse[k] * inverse1[k] * inverse2[k];
    factors.shift[k] = inverse1[k] * inverse2[k];
    factors.correction[k] = inverse2[k];
  }
  for (int k = 0; k < kRowsPerBlock; ++k)
    factors.fused[k] = rows.dim >= kSmallestFusedDim && fits_float32(products[0][k]) &&
                       square1[k] >= kSmallestFusedSquare && square2[k] >= kSmallestFusedSquare;
  return factors;
}

// Of rows that take the fused form their part alone goes to the sums, and how often the vectors of the map come on top
// behind them; of rows that go the long way the whole mapped row.
template <int K, typename T>
inline void transformed_moments_of(const RowRange& rows, const Map& map, int64_t* sums, double* scratch, BadRows* bad) {
  int64_t of_shift = 0, of_correction = 0;
  for (int64_t first = 0; first < rows.num_rows; first += kRowsPerBlock) {
    const int count = block_size(rows, first);
    Ahead ahead = ahead_of(rows, first);
    const Factors factors = factors_of<K, T>(rows, first, count, MapTable{&map, nullptr}, &ahead);
    Block<T> block;
    for (int k = 0; k < count; ++k) {
      const int64_t i = first + k;
      if (factors.fused[k] && factors.shift[k] <= map.largest_factor) {
        block.rows[block.count] = row_at<T>(rows, i);
        block.factor[block.count++] = float(factors.row[k] * map.units);
        of_shift += int64_t(__builtin_rint(factors.shift[k] * map.shift_units));
        if (K == 2) of_correction += int64_t(__builtin_rint(factors.correction[k] * map.correction_units));
        continue;
      }
      const RowKind kind = unit_row(row_at<T>(rows, i), rows.dim, scratch);
      count_bad(kind, i, bad);
      if (kind != kGood) continue;
      map_unit_row(map, rows.dim, scratch);
      add_row(scratch, rows.dim, map.units, sums);
    }
    add_block(block, Nowhere(), rows.dim, sums, ahead);
  }
  sums[rows.dim] += of_shift;
  sums[rows.dim + 1] += of_correction;
}

template <typename T>
void transformed_moments(const RowRange& rows, const Map& map, int64_t* sums, double* scratch, BadRows* bad) {
  if (map.correction_correction == 0)
    transformed_moments_of<1, T>(rows, map, sums, scratch, bad);
  else
    transformed_moments_of<2, T>(rows, map, sums, scratch, bad);
}

template <>
void transformed_moments<double>(const RowRange& rows, const Map& map, int64_t* sums, double* scratch, BadRows* bad) {
  for (int64_t i = 0; i < rows.num_rows; ++i) {
    const RowKind kind = unit_row(row_at<double>(rows, i), rows.dim, scratch);
    count_bad(kind, i, bad);
    if (kind != kGood) continue;
    map_unit_row(map, rows.dim, scratch);
    add_row(scratch, rows.dim, map.units, sums);
  }
}

template <typename In, typename Out>
inline void write_long(const RowRange& rows, const Map& map, int64_t i, Out* out, double* scratch, BadRows* bad) {
  const RowKind kind = unit_row(row_at<In>(rows, i), rows.dim, scratch);
  count_bad(kind, i, bad);
  if (kind == kGood)
    map_unit_row(map, rows.dim, scratch);
  else
    __builtin_memset(scratch, 0, size_t(rows.dim) * sizeof(double));
  for (int64_t j = 0; j < rows.dim; ++j) {
    Out element;
    from_double(scratch[j], &element);
    __builtin_memcpy(out + j, &element, sizeof element);
  }
}

// One row on its way out: out = row x + shift_factor shift + correction_factor correction.
template <typename In, typename Out>
struct FusedRow {
  const In* x;
  Out* out;
  F row, shift, correction;

  F value(F a, F shift_part, F correction_part) const __attribute__((always_inline)) {
    return fma(row, a, fma(shift, shift_part, mul(correction, correction_part)));
  }
};

// Elements [from, to) of rows that share the loads of both vectors. Here and below the loop has copies of what it
// needs, in registers: a store to the outputs might change all else, and it would be loaded again after each.
template <int kRows, typename In, typename Out>
inline __attribute__((always_inline)) void write_fused(const FusedRow<In, Out> (&rows)[kRows], const Map& map,
                                                       int64_t from, int64_t to, Ahead* ahead) {
  const float *const shifts = map.shift, *const corrections = map.correction;
  Ahead next = *ahead;
  int64_t j = from;
  for (; j + W <= to; j += W) {
    const F shift = load(shifts + j), correction = load(corrections + j);
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      F x = load(rows[r].x + j);
      next.template vector<kRows, W * sizeof(In)>(r, x);
      store(rows[r].out + j, rows[r].value(x, shift, correction));
    }
    next.template step<kRows, W * sizeof(In)>();
  }
  *ahead = next;
  if (j == to) return;
  const F shift = load(shifts + j), correction = load(corrections + j);
  for (int r = 0; r < kRows; ++r)
    store_first(rows[r].out + j, to - j, rows[r].value(load_first(rows[r].x + j, to - j), shift, correction));
}

// Whole lines pass the caches. A line that two rows share must not: the halves of it would each cost a read and a
// write.
template <typename In, typename Out>
inline void stream_fused(const FusedRow<In, Out> (&rows)[1], const Map& map, int64_t dim, Ahead* ahead) {
  const FusedRow<In, Out> row = rows[0];
  const float *const shifts = map.shift, *const corrections = map.correction;
  constexpr int64_t kLine = kLineBytes / int64_t(sizeof(Out));
  constexpr int kVectors = int(kLine) / W;
  const int64_t past = int64_t(reinterpret_cast<uintptr_t>(row.out) % kLineBytes) / int64_t(sizeof(Out));
  const int64_t begin = past == 0 ? 0 : kLine - past < dim ? kLine - past : dim;
  const int64_t end = begin + (dim - begin) / kLine * kLine;
  write_fused(rows, map, 0, begin, ahead);
  Ahead next = *ahead;
  for (int64_t j = begin; j < end; j += kLine) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = j + v * W;
      F x = load(row.x + at);
      next.template vector<kVectors, W * sizeof(In)>(v, x);
      stream(row.out + at, row.value(x, load(shifts + at), load(corrections + at)));
    }
    next.template step<kVectors, W * sizeof(In)>();
  }
  *ahead = next;
  write_fused(rows, map, end, dim, ahead);
}

template <typename In, typename Out>
void row_transform(const RowRange& rows, const MapTable& maps, char* out_data, int64_t out_stride, bool nontemporal,
                   double* scratch, BadRows* bad) {
  for (int64_t first = 0; first < rows.num_rows; first += kRowsPerBlock) {
    const int count = block_size(rows, first);
    Ahead ahead = ahead_of(rows, first);
    const Factors factors = factors_of<2, In>(rows, first, count, maps, &ahead);
    const auto out_at = [&](int k) { return reinterpret_cast<Out*>(out_data + (first + k) * out_stride); };
    const auto row_of = [&](int k) {
      return FusedRow<In, Out>{row_at<In>(rows, first + k), out_at(k), set1(float(factors.row[k])),
                               set1(float(factors.shift[k])), set1(float(factors.correction[k]))};
    };
    for (int k = 0; k < count; ++k) {
      const Map& map = maps.of(first + k);
      if (!factors.fused[k]) {
        write_long<In>(rows, map, first + k, out_at(k), scratch, bad);
        continue;
      }
      // A stream needs whole elements up to the next aligned address.
      if (nontemporal && reinterpret_cast<uintptr_t>(out_at(k)) % sizeof(Out) == 0) {
        stream_fused({row_of(k)}, map, rows.dim, &ahead);
      } else if (k + 1 < count && factors.fused[k + 1] && &maps.of(first + k + 1) == &map) {
        write_fused<2, In, Out>({row_of(k), row_of(k + 1)}, map, 0, rows.dim, &ahead);
        ++k;
      } else {
        write_fused<1, In, Out>({row_of(k)}, map, 0, rows.dim, &ahead);
      }
    }
  }
  if (nontemporal) fence();
}

template <typename In, typename Out>
void row_transform_long(const RowRange& rows, const MapTable& maps, char* out_data, int64_t out_stride, bool,
                        double* scratch, BadRows* bad) {
  for (int64_t i = 0; i < rows.num_rows; ++i)
    write_long<In>(rows, maps.of(i), i, reinterpret_cast<Out*>(out_data + i * out_stride), scratch, bad);
}

// ---- The gradient of the map --------------------------------------------------------------------------------------

// The inner products of row, shift, correction and gradient g that depend on the row.
struct Products {
  double x_x, x_c, x_b, x_g, c_g, b_g;
};

// grad_x = g of_g + x of_x + shift of_c + correction of_b. Through a projection z / n goes (g - p (p.g)) / n, p =
// pi(z); the products that this needs follow from those given.
struct GradientFactors {
  double of_g, of_x, of_c, of_b;
  double square1, square2;  // of both n after the first

  GradientFactors(const Map& map, const Products& at) {
    const double s = map.scale, r = 1 / __builtin_sqrt(at.x_x);
    const double u_c = r * at.x_c, u_b = r * at.x_b, u_g = r * at.x_g;
    square1 = s * s + 2 * s * u_c + map.shift_shift;
    const double inverse1 = 1 / __builtin_sqrt(square1);
    const double v_b = (s * u_b + map.shift_correction) * inverse1;
    square2 = 1 + 2 * v_b + map.correction_correction;
    const double inverse2 = 1 / __builtin_sqrt(square2);
    const double u_v = (s + u_c) * inverse1, v_g = (s * u_g + at.c_g) * inverse1;
    const double out_g = (v_g + at.b_g) * inverse2;
    const double along_b = out_g * inverse2 * inverse2;
    const double v_g2 = v_g * inverse2 - along_b * (1 + v_b);
    const double u_g2 = u_g * inverse2 - along_b * (u_v + u_b);
    const double u_g1 = (u_g2 - u_v * v_g2) * inverse1;
    const double along_v = (along_b + v_g2) * inverse1 * inverse1;
    of_g = s * r * inverse1 * inverse2;
    of_x = -s * r * r * (s * along_v + u_g1);
    of_c = -s * r * along_v;
    of_b = -s * r * along_b * inverse1;
  }
};

template <typename In, typename Grad>
inline Products products_of(const In* x, const Grad* g, const Map& map, int64_t dim) {
  F sums[2][6];  // two each, as many as the registers of AVX2 hold
  for (int i = 0; i < 2; ++i)
    for (int k = 0; k < 6; ++k) sums[i][k] = zero();
  const auto add_products = [&](F* to, F row, F grad, int64_t j) {
    const F shift = load(map.shift + j), correction = load(map.correction + j);
    to[0] = fma(row, row, to[0]);
    to[1] = fma(row, shift, to[1]);
    to[2] = fma(row, correction, to[2]);
    to[3] = fma(row, grad, to[3]);
    to[4] = fma(grad, shift, to[4]);
    to[5] = fma(grad, correction, to[5]);
  };
  int64_t j = 0;
  for (; j + 2 * W <= dim; j += 2 * W) {
    add_products(sums[0], load(x + j), load(g + j), j);
    add_products(sums[1], load(x + j + W), load(g + j + W), j + W);
  }
  for (; j < dim; j += W) {
    const bool whole = dim - j >= W;
    add_products(sums[0], whole ? load(x + j) : load_first(x + j, dim - j),
                 whole ? load(g + j) : load_first(g + j, dim - j), j);
  }
  double found[6];
  for (int k = 0; k < 6; ++k) found[k] = sum_of(add(sums[0][k], sums[1][k]));
  return {found[0], found[1], found[2], found[3], found[4], found[5]};
}

template <typename In, typename Grad>
inline void write_gradient(const In* x, const Grad* g, const Map& map, const GradientFactors& by, int64_t dim,
                           In* out) {
  const F of_g = set1(float(by.of_g)), of_x = set1(float(by.of_x));
  const F of_c = set1(float(by.of_c)), of_b = set1(float(by.of_b));
  const float *const shifts = map.shift, *const corrections = map.correction;  // as in `write_fused`
  for (int64_t j = 0; j < dim; j += W) {
    const int64_t count = dim - j;
    const F row = count >= W ? load(x + j) : load_first(x + j, count);
    const F grad = count >= W ? load(g + j) : load_first(g + j, count);
    const F rest = fma(of_c, load(shifts + j), mul(of_b, load(corrections + j)));
    const F value = fma(of_g, grad, fma(of_x, row, rest));
    if (count >= W)
      store(out + j, value);
    else
      store_first(out + j, count, value);
  }
}

template <typename T>
inline double element(const T* x, int64_t j) {
  T value;
  __builtin_memcpy(&value, x + j, sizeof value);
  return to_double(value);
}

// In float64, of the unit row, whatever the magnitude of the row; then over its norm.
template <typename In, typename Grad>
inline void write_gradient_long(const In* x, const Grad* g, const Map& map, int64_t dim, In* out, double* unit) {
  const bool good = unit_row(x, dim, unit) == kGood;
  Products products = {1, 0, 0, 0, 0, 0};
  double norm = 0;
  for (int64_t j = 0; good && j < dim; ++j) {
    const double grad = element(g, j), shift = map.shift64[j], correction = map.correction64[j];
    norm += unit[j] * element(x, j);
    products.x_c += unit[j] * shift;
    products.x_b += unit[j] * correction;
    products.x_g += unit[j] * grad;
    products.c_g += shift * grad;
    products.b_g += correction * grad;
  }
  const GradientFactors by(map, products);
  const bool defined = good && by.square1 > 0 && by.square2 > 0;  // pi(0) = 0 has no gradient
  for (int64_t j = 0; j < dim; ++j) {
    double value = 0;
    if (defined) {
      value = by.of_g * element(g, j) + by.of_x * unit[j] + by.of_c * map.shift64[j] + by.of_b * map.correction64[j];
      value /= norm;
    }
    In narrow;
    from_double(value, &narrow);
    __builtin_memcpy(out + j, &narrow, sizeof narrow);
  }
}

template <typename In, typename Grad>
void row_transform_backward(const RowRange& rows, const char* grad, int64_t grad_stride, const Map& map, char* out_data,
                            int64_t out_stride, double* scratch) {
  for (int64_t i = 0; i < rows.num_rows; ++i) {
    const In* x = row_at<In>(rows, i);
    const Grad* g = reinterpret_cast<const Grad*>(grad + i * grad_stride);
    In* out = reinterpret_cast<In*>(out_data + i * out_stride);
    const Products products = products_of(x, g, map, rows.dim);
    const GradientFactors factors(map, products);
    if (rows.dim >= kSmallestFusedDim && fits_float32(products.x_x) && factors.square1 >= kSmallestFusedSquare &&
        factors.square2 >= kSmallestFusedSquare)
      write_gradient(x, g, map, factors, rows.dim, out);
    else
      write_gradient_long(x, g, map, rows.dim, out, scratch);
  }
}

template <typename In, typename Grad>
void row_transform_backward_long(const RowRange& rows, const char* grad, int64_t grad_stride, const Map& map,
                                 char* out_data, int64_t out_stride, double* scratch) {
  for (int64_t i = 0; i < rows.num_rows; ++i)
    write_gradient_long(row_at<In>(rows, i), reinterpret_cast<const Grad*>(grad + i * grad_stride), map, rows.dim,
                        reinterpret_cast<In*>(out_data + i * out_stride), scratch);
}

// ---- Products of matrices ------------------------------------------------------------------------------------------

// tile[i][j] (+)= sum over k of a(k)[i] b[k][j], kPanelRows rows and kVectors vectors of a panel's columns in a tile of
// `stride` columns. All sums stay in registers, and each element of a panel is read from the first cache.
template <int kVectors = kPanelVectors, typename A>
inline void multiply(const A& a, const float* b, int64_t count, float* tile, int64_t stride, bool first) {
  F sums[kPanelRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kPanelRows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[i][v] = zero();
  for (int64_t k = 0; k < count; ++k) {
    F columns[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) columns[v] = load(b + k * kPanelWidth + v * W);
#pragma GCC unroll 8
    for (int i = 0; i < kPanelRows; ++i) {
      const F x = set1(a.at(k, i));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[i][v] = fma(x, columns[v], sums[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kPanelRows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* to = tile + i * stride + v * W;
      store(to, first ? sums[i][v] : add(sums[i][v], load(to)));
    }
}

// Rows as they lie.
struct RowsAt {
  const float* rows;
  int64_t stride;
  float at(int64_t k, int i) const { return rows[i * stride + k]; }
};

// So many columns at a time: a panel of the matrix then stays in the first cache while all rows pass it.
constexpr int64_t kColumnsAtATime = 192;

void affine(const float* rows, int64_t row_stride, int64_t num_rows, int64_t dim, const float* matrix, int64_t out_dim,
            float* out, int64_t out_stride) {
  for (int64_t k = 0; k < dim; k += kColumnsAtATime) {
    const int64_t count = dim - k < kColumnsAtATime ? dim - k : kColumnsAtATime;
    for (int64_t j = 0; j < out_dim; j += kPanelWidth)
      for (int64_t i = 0; i < num_rows; i += kPanelRows)
        multiply(RowsAt{rows + i * row_stride + k, row_stride}, matrix + j * dim + k * kPanelWidth, count,
                 out + i * out_stride + j, out_stride, false);
  }
}

// A panel read along its columns.
struct Transposed {
  const float* panel;
  float at(int64_t k, int i) const { return panel[k * kPanelWidth + i]; }
};

// The same, of the first `num_columns` of the panel's columns.
inline void multiply_lower(const Transposed& a, const float* b, int64_t count, float* tile, bool first,
                           int64_t num_columns) {
  static_assert(kPanelVectors == 2 || kPanelVectors == 3);
  if (num_columns <= W)
    multiply<1>(a, b, count, tile, kTileSide, first);
  else if (num_columns <= 2 * W)
    multiply<2>(a, b, count, tile, kTileSide, first);
  else
    multiply(a, b, count, tile, kTileSide, first);
}

void products(const float* panels, int64_t stride, int64_t num_rows, SumLengths lengths, int64_t tile_row,
              int64_t tile_column, int64_t dim, double* products) {
  alignas(64) float tile[kTileSide * kTileSide];
  const int64_t first_row = tile_row * kTileSide, first_column = tile_column * kTileSide;
  const auto panel_at = [&](int64_t column, int64_t row) {
    return panels + column / kPanelWidth * stride + row * kPanelWidth + column % kPanelWidth;
  };
  for (int64_t row = 0; row < num_rows; row += lengths.in_float32) {
    const int64_t end = num_rows - row < lengths.in_float32 ? num_rows : row + lengths.in_float32;
    for (int64_t begin = row; begin < end; begin += lengths.in_registers) {
      const int64_t count = end - begin < lengths.in_registers ? end - begin : lengths.in_registers;
      for (int64_t j = 0; j < kTileSide && first_column + j < dim; j += kPanelWidth)
        for (int64_t i = 0; i < kTileSide && first_row + i < dim; i += kPanelRows) {
          const int64_t num_columns = first_row + i + kPanelRows - (first_column + j);  // not above the diagonal
          if (num_columns > 0)
            multiply_lower(Transposed{panel_at(first_row + i, begin)}, panel_at(first_column + j, begin), count,
                           tile + i * kTileSide + j, begin == row, num_columns);
        }
    }
    add_lower(tile, first_row, first_column, dim, products);
  }
}

// ---- Noise, and rows on their way out -------------------------------------------------------------------------------

// Philox 4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011), lane by lane: plain loops that
// the compiler turns into vectors of whatever width, with the same bits in all of them.
constexpr int kLanes = 16;
using Words = uint32_t[4][kLanes];

inline void philox(uint64_t seed, int64_t row, int64_t first_group, Words& x) {
  for (int lane = 0; lane < kLanes; ++lane) {
    x[0][lane] = uint32_t(first_group) + uint32_t(lane);
    x[1][lane] = uint32_t(uint64_t(row));
    x[2][lane] = uint32_t(uint64_t(row) >> 32);
    x[3][lane] = 0;
  }
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint64_t a = uint64_t(0xD2511F53u) * x[0][lane], b = uint64_t(0xCD9E8D57u) * x[2][lane];
      x[0][lane] = uint32_t(b >> 32) ^ x[1][lane] ^ key0;
      x[2][lane] = uint32_t(a >> 32) ^ x[3][lane] ^ key1;
      x[1][lane] = uint32_t(b);
      x[3][lane] = uint32_t(a);
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// In (0, 1), of the upper 24 bits.
inline float uniform(uint32_t word) { return (float(int32_t(word >> 8)) + 0.5f) * 0x1p-24f; }

// Natural logarithm of x in (0, 1): the exponent, and an odd series in (m - 1) / (m + 1) of the mantissa m.
inline float log_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const uint32_t shifted = bits - 0x3f3504f3u;  // the mantissa then lies in [sqrt(1/2), sqrt(2))
  const int32_t exponent = int32_t(shifted) >> 23;
  const uint32_t mantissa_bits = (shifted & 0x007fffffu) + 0x3f3504f3u;
  float mantissa;
  __builtin_memcpy(&mantissa, &mantissa_bits, sizeof mantissa);
  const float t = (mantissa - 1) / (mantissa + 1), t2 = t * t;
  const float series = 2 * t + t * t2 * (2.0f / 3 + t2 * (2.0f / 5 + t2 * (2.0f / 7 + t2 * (2.0f / 9))));
  return float(exponent) * 0.693147182f + series;
}

// The two normal numbers of Box and Muller for two uniform ones.
inline void box_muller(float u1, float u2, float* z1, float* z2) {
  const float radius = __builtin_sqrtf(-2 * log_of(u1));
  // The angle in eighths of a turn around the nearest quarter, there by series.
  const int32_t quarter = int32_t(4 * u2 + 0.5f);
  const float x = (u2 - 0.25f * float(quarter)) * 6.28318531f, x2 = x * x;
  const float sine = x + x * x2 * (-1.0f / 6 + x2 * (1.0f / 120 + x2 * (-1.0f / 5040)));
  const float cosine = 1 + x2 * (-0.5f + x2 * (1.0f / 24 + x2 * (-1.0f / 720 + x2 * (1.0f / 40320))));
  const bool swapped = quarter & 1;
  const float c = swapped ? sine : cosine, s = swapped ? cosine : sine;
  *z1 = radius * ((quarter + 1) & 2 ? -c : c);
  *z2 = radius * (quarter & 2 ? -s : s);
}

// Element j takes number j / groups of the four that its group, j % groups, makes.
inline void normals(uint64_t seed, int64_t row, int64_t dim, float* out) {
  const int64_t groups = (dim + 3) / 4;
  for (int64_t group = 0; group < groups; group += kLanes) {
    Words words;
    philox(seed, row, group, words);
    float z[4][kLanes];
    for (int lane = 0; lane < kLanes; ++lane)
      box_muller(uniform(words[0][lane]), uniform(words[1][lane]), &z[0][lane], &z[1][lane]);
    for (int lane = 0; lane < kLanes; ++lane)
      box_muller(uniform(words[2][lane]), uniform(words[3][lane]), &z[2][lane], &z[3][lane]);
    const int64_t lanes = groups - group < kLanes ? groups - group : kLanes;
    for (int64_t word = 0; word < 4; ++word) {
      const int64_t at = word * groups + group, room = dim - at;
      if (room > 0) __builtin_memcpy(out + at, z[word], size_t(lanes < room ? lanes : room) * sizeof(float));
    }
  }
}

template <typename Out>
inline void write_row(const float* row, float factor, int64_t dim, Out* out) {
  for (int64_t j = 0; j + W <= dim; j += W) store(out + j, mul(load(row + j), set1(factor)));
  if (const int64_t rest = dim % W)
    store_first(out + dim - rest, rest, mul(load_first(row + dim - rest, rest), set1(factor)));
}

inline void write_row(const float* row, float factor, int64_t dim, double* out) {
  for (int64_t j = 0; j < dim; ++j) {
    const double value = double(row[j]) * double(factor);
    __builtin_memcpy(out + j, &value, sizeof value);
  }
}

template <typename Out>
void write(const float* rows, int64_t row_stride, int64_t num_rows, int64_t dim, const Noise* noise, char* out_data,
           int64_t out_stride, float* scratch) {
  for (int64_t i = 0; i < num_rows; ++i) {
    const float* row = rows + i * row_stride;
    Out* out = reinterpret_cast<Out*>(out_data + i * out_stride);
    float factor = 1;
    if (noise && square_of(row, dim) > 0) {
      normals(noise->seed, noise->number(i), dim, scratch);
      const float std = float(noise->std);
      for (int64_t j = 0; j < dim; ++j) scratch[j] = row[j] + std * scratch[j];
      row = scratch;
      const double square = square_of(row, dim);
      if (square > 0) factor = float(1 / __builtin_sqrt(square));
    }
    write_row(row, factor, dim, out);
  }
}

// ---- Bad rows, and the machine's own speed --------------------------------------------------------------------------

template <typename T>
inline bool surely_good(const T* x, int64_t dim) {
  return fits_float32(square_of(x, dim));
}
inline bool surely_good(const double*, int64_t) { return false; }

template <typename T>
void find_bad_rows(const RowRange& rows, double* scratch, BadRows* bad) {
  for (int64_t i = 0; i < rows.num_rows; ++i) {
    const T* x = row_at<T>(rows, i);
    if (!surely_good(x, rows.dim)) count_bad(unit_row(x, rows.dim, scratch), i, bad);
  }
}

uint64_t stream_read(const char* data, int64_t size) {
  I sums[4] = {to_int32(zero()), to_int32(zero()), to_int32(zero()), to_int32(zero())};
  constexpr int64_t kStep = int64_t(sizeof(I));
  int64_t at = 0;
  for (; at + 4 * kStep <= size; at += 4 * kStep)
    for (int k = 0; k < 4; ++k) sums[k] = add(sums[k], load_int32(data + at + k * kStep));
  int64_t lanes[W] = {};
  for (int k = 0; k < 4; ++k) add_to_int64(lanes, sums[k]);
  uint64_t sum = 0;
  for (int lane = 0; lane < W; ++lane) sum += uint64_t(lanes[lane]);
  for (; at < size; ++at) sum += uint64_t(data[at]);
  return sum;
}

void stream_copy(const char* source, char* target, int64_t size, bool nontemporal) {
  constexpr int64_t kStep = W * int64_t(sizeof(float));
  int64_t at = 0;
  if (nontemporal) {
    const int64_t head = -int64_t(reinterpret_cast<uintptr_t>(target)) & 63;
    at = head < size ? head : size;
    __builtin_memcpy(target, source, size_t(at));
    for (; at + kStep <= size; at += kStep)
      stream(reinterpret_cast<float*>(target + at), load(reinterpret_cast<const float*>(source + at)));
    fence();
  }
  __builtin_memcpy(target + at, source + at, size_t(size - at));
}

// clang-format off
#define REALIGN_TABLE(NAME)                                                                                          \
  {NAME,                                                                                                             \
   {moments<Half>, moments<Bf16>, moments<float>, moments<double>},                                                  \
   {transformed_moments<Half>, transformed_moments<Bf16>, transformed_moments<float>, transformed_moments<double>},  \
   {{row_transform<Half, Half>, row_transform<Half, Bf16>, row_transform<Half, float>, row_transform_long<Half, double>},         \
    {row_transform<Bf16, Half>, row_transform<Bf16, Bf16>, row_transform<Bf16, float>, row_transform_long<Bf16, double>},         \
    {row_transform<float, Half>, row_transform<float, Bf16>, row_transform<float, float>, row_transform_long<float, double>},     \
    {row_transform_long<double, Half>, row_transform_long<double, Bf16>, row_transform_long<double, float>, row_transform_long<double, double>}}, \
   {{row_transform_backward<Half, Half>, row_transform_backward<Half, Bf16>, row_transform_backward<Half, float>, row_transform_backward_long<Half, double>},     \
    {row_transform_backward<Bf16, Half>, row_transform_backward<Bf16, Bf16>, row_transform_backward<Bf16, float>, row_transform_backward_long<Bf16, double>},     \
    {row_transform_backward<float, Half>, row_transform_backward<float, Bf16>, row_transform_backward<float, float>, row_transform_backward_long<float, double>}, \
    {row_transform_backward_long<double, Half>, row_transform_backward_long<double, Bf16>, row_transform_backward_long<double, float>, row_transform_backward_long<double, double>}}, \
   {find_bad_rows<Half>, find_bad_rows<Bf16>, find_bad_rows<float>, find_bad_rows<double>},                          \
   kPanelWidth,                                                                                                      \
   products,                                                                                                         \
   affine,                                                                                                           \
   {write<Half>, write<Bf16>, write<float>, write<double>},                                                          \
   stream_read,                                                                                                      \
   stream_copy}
// clang-format on

}  // namespace
