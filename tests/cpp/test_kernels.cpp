// Every kernel of every table that runs here against plain loops in double. Rows and outputs end where their block of
// memory ends, so that the address sanitizer sees a byte too many.
//
// Built with -DREALIGN_TEST_TABLE=kAvx512 (or another) it tests that table alone, whatever the processor says.
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "check.h"
#include "covariance.h"
#include "dispatch.h"
#include "moments.h"
#include "row_transform.h"

namespace {

using namespace realign;

const int64_t kDims[] = {1, 3, 63, 64, 65, 127, 255, 768};
const int64_t kCounts[] = {0, 1, 7, 8, 9, 65};
const char* const kDtypeNames[] = {"float16", "bfloat16", "float32", "float64"};
// Half the last place of the largest element of a unit row, with room for the sums behind it.
const double kTolerance[] = {2.5e-4 + 3e-7, 2e-3 + 3e-7, 3e-7, 1e-14};
constexpr double kUnits = double(int64_t(1) << kFixedPointBits);

// ---- Numbers, the plain way ---------------------------------------------------------------------------------------

double decode(const char* at, Dtype dtype) {
  if (dtype == kFloat64) {
    double value;
    std::memcpy(&value, at, 8);
    return value;
  }
  if (dtype == kFloat32) {
    float value;
    std::memcpy(&value, at, 4);
    return double(value);
  }
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  if (dtype == kBfloat16) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return double(value);
  }
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  double value = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
  if (exponent == 31) value = mantissa ? std::nan("") : std::numeric_limits<double>::infinity();
  return bits & 0x8000 ? -value : value;
}

// The input need not be rounded to the nearest: what counts is what `decode` makes of it.
void encode(double value, Dtype dtype, char* at) {
  if (dtype == kFloat64) {
    std::memcpy(at, &value, 8);
    return;
  }
  const float narrow = float(value);
  uint32_t wide;
  std::memcpy(&wide, &narrow, 4);
  uint16_t bits = uint16_t(wide >> 16);
  if (dtype == kFloat16) {
    const double magnitude = std::fabs(value);
    if (!(magnitude < 65504)) {
      bits = std::isnan(value) ? 0x7e00 : std::isinf(value) ? 0x7c00 : 0x7bff;
    } else if (magnitude == 0) {
      bits = 0;
    } else {
      const int exponent = std::ilogb(magnitude) < -14 ? -14 : std::ilogb(magnitude);
      bits = uint16_t(((exponent + 15) << 10) + int(std::ldexp(magnitude, 10 - exponent)) - 1024);
    }
    bits = uint16_t(bits | (std::signbit(value) ? 0x8000 : 0));
  }
  std::memcpy(at, dtype == kFloat32 ? reinterpret_cast<const char*>(&wide) : reinterpret_cast<const char*>(&bits),
              size_t(kItemsize[dtype]));
}

// ---- Rows in memory -----------------------------------------------------------------------------------------------

struct Layout {
  int64_t offset, gap;  // bytes before the first row, and between rows
};

const Layout kLayouts[] = {{0, 0}, {1, 3}, {8, 40}, {48, 17}};

// A block that ends with the last element of the last row.
class Block {
 public:
  Block(int64_t count, int64_t dim, Dtype dtype, Layout layout)
      : count_(count), dim_(dim), dtype_(dtype), layout_(layout) {
    const int64_t row = dim * kItemsize[dtype];
    size_ = layout.offset + (count > 0 ? count * (row + layout.gap) - layout.gap : 0);
    bytes_.reset(new char[size_t(size_)]);
    std::memset(bytes_.get(), 0x5a, size_t(size_));
  }
  int64_t stride() const { return dim_ * kItemsize[dtype_] + layout_.gap; }
  char* data() { return bytes_.get() + layout_.offset; }
  char* at(int64_t i, int64_t j) { return data() + i * stride() + j * kItemsize[dtype_]; }
  RowRange range() { return {data(), stride(), count_, dim_}; }

  void check_gaps() {
    const int64_t row = dim_ * kItemsize[dtype_];
    for (int64_t at = 0; at < size_; ++at)
      if (at < layout_.offset || (at - layout_.offset) % stride() >= row)
        CHECK(bytes_[size_t(at)] == 0x5a, "byte %lld, between the rows, was written", (long long)at);
  }

 private:
  int64_t count_, dim_;
  Dtype dtype_;
  Layout layout_;
  int64_t size_;
  std::unique_ptr<char[]> bytes_;
};

// ---- What the kernels compute, the plain way ----------------------------------------------------------------------

struct TestMap {
  double scale;
  std::vector<double> shift, correction;
};

void project(std::vector<double>* x) {
  double square = 0;
  for (const double value : *x) square += value * value;
  if (square == 0) return;
  for (double& value : *x) value /= std::sqrt(square);
}

struct Expected {
  std::vector<std::vector<double>> units, mapped;  // zeros for bad rows
  BadRows bad;
  std::vector<bool> good;
};

Expected expected_of(Block* rows, int64_t count, int64_t dim, Dtype dtype, const TestMap& map) {
  Expected expected;
  for (int64_t i = 0; i < count; ++i) {
    std::vector<double> row;
    double largest = 0;
    bool finite = true;
    for (int64_t j = 0; j < dim; ++j) {
      row.push_back(decode(rows->at(i, j), dtype));
      finite = finite && std::isfinite(row.back());
      largest = std::fmax(largest, std::fabs(row.back()));
    }
    const bool good = finite && largest > 0;
    expected.good.push_back(good);
    if (!good) {
      ++(finite ? expected.bad.num_zero : expected.bad.num_nonfinite);
      if (expected.bad.first < 0) expected.bad.first = i;
      expected.units.emplace_back(size_t(dim), 0.0);
      expected.mapped.emplace_back(size_t(dim), 0.0);
      continue;
    }
    for (double& value : row) value = std::ldexp(value, -std::ilogb(largest));
    project(&row);
    expected.units.push_back(row);
    for (int64_t j = 0; j < dim; ++j) row[size_t(j)] = map.scale * row[size_t(j)] + map.shift[size_t(j)];
    project(&row);
    for (int64_t j = 0; j < dim; ++j) row[size_t(j)] += map.correction[size_t(j)];
    project(&row);
    expected.mapped.push_back(row);
  }
  return expected;
}

// ---- What is mapped -----------------------------------------------------------------------------------------------

enum Contents { kPlain, kWithBadRows, kManyMagnitudes, kNumContents };

std::vector<double> make_values(int64_t count, int64_t dim, Dtype dtype, Contents contents) {
  Random random(uint64_t(count * 1000 + dim * 10 + dtype));
  std::vector<double> values;
  for (int64_t k = 0; k < count * dim; ++k) values.push_back((random.uniform() + 0.1) / std::sqrt(double(dim)));
  if (contents == kPlain) return values;
  for (int64_t i = 0; i < count; ++i) {
    double* row = values.data() + i * dim;
    if (contents == kManyMagnitudes) {
      const double largest = dtype == kFloat16 ? 1e4 : dtype == kFloat64 ? 1e300 : 1e37;
      const double smallest = dtype == kFloat16 ? 1e-5 : dtype == kFloat64 ? 1e-308 : 1e-36;
      const double factor = i % 4 == 0 ? largest : i % 4 == 1 ? smallest : i % 4 == 2 ? 1e3 : 1e-2;
      for (int64_t j = 0; j < dim; ++j) row[j] *= factor;
    } else if (i % 8 == 1 || (i == 0 && count == 1)) {
      for (int64_t j = 0; j < dim; ++j) row[j] = j % 2 ? -0.0 : 0.0;
    } else if (i % 8 == 3) {
      row[dim - 1] = std::nan("");
    } else if (i % 8 == 4) {
      row[0] = -std::numeric_limits<double>::infinity();
    } else if (i % 8 == 6) {
      row[dim / 2] = std::numeric_limits<double>::infinity();
      row[0] = -row[dim / 2];
    }
  }
  return values;
}

enum MapKind { kUsual, kIdentity, kOpposite, kNumMaps };

TestMap make_map(int64_t dim, MapKind kind, const std::vector<double>& row) {
  TestMap map{1.2, {}, {}};
  Random random{uint64_t(dim)};
  for (int64_t j = 0; j < dim; ++j) {
    map.shift.push_back(0.5 * random.uniform() / std::sqrt(double(dim)));
    map.correction.push_back(0.1 * random.uniform() / std::sqrt(double(dim)));
  }
  if (kind == kIdentity) map = {1, std::vector<double>(size_t(dim)), std::vector<double>(size_t(dim))};
  // Nearly takes the first row to zero, where single precision would lose its digits.
  if (kind == kOpposite && !row.empty())
    for (int64_t j = 0; j < dim; ++j) map.shift[size_t(j)] = -1.1 * row[size_t(j)];
  return map;
}

std::string where(const KernelTable& table, Dtype dtype, int64_t count, int64_t dim, Layout layout, int contents) {
  return std::string(table.name) + " " + kDtypeNames[dtype] + " " + std::to_string(count) + "x" + std::to_string(dim) +
         " offset " + std::to_string(layout.offset) + " gap " + std::to_string(layout.gap) + " contents " +
         std::to_string(contents);
}

void check_bad(const BadRows& found, const BadRows& expected, const std::string& at) {
  CHECK(found.num_zero == expected.num_zero, "%s", at.c_str());
  CHECK(found.num_nonfinite == expected.num_nonfinite, "%s", at.c_str());
  CHECK(found.first == expected.first, "%s", at.c_str());
}

void check_sums(const std::vector<int64_t>& sums, const std::vector<std::vector<double>>& rows, const std::string& at) {
  for (size_t j = 0; j < sums.size(); ++j) {
    double expected = 0, room = 0;
    for (const auto& row : rows) {
      expected += row[j] * kUnits;
      room += 1 + 3e-7 * kUnits;
    }
    CHECK(std::fabs(double(sums[j]) - expected) <= room, "%s: sum %zu is %lld, expected %f", at.c_str(), j,
          (long long)sums[j], expected);
  }
}

// One set of rows in one layout, through every kernel. The first layout leaves its bits for the others to compare with.
struct Case {
  const KernelTable& table;
  Dtype dtype;
  int64_t count, dim;
  Contents contents;
  const std::vector<double>& values;
  const TestMap& map;
  const Expected& expected;
  std::vector<int64_t> sums, mapped_sums;
  std::vector<uint64_t> keys;
  std::vector<std::string> out[kNumDtypes], gradients[kNumDtypes];

  Block make(Layout layout) const {
    Block rows(count, dim, dtype, layout);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < dim; ++j) encode(values[size_t(i * dim + j)], dtype, rows.at(i, j));
    return rows;
  }

  void run(Layout layout, bool first) {
    const std::string at = where(table, dtype, count, dim, layout, contents);
    Block rows = make(layout);
    const RowMap vectors(map.scale, map.shift.data(), map.correction.data(), dim);
    const Map view = vectors.view();
    const MapTable maps{&view, nullptr};
    const std::unique_ptr<double[]> scratch(new double[size_t(dim)]);

    BadRows bad;
    table.find_bad_rows[dtype](rows.range(), scratch.get(), &bad);
    check_bad(bad, expected.bad, at + " find_bad_rows");

    check_moments(&rows, scratch.get(), at + " moments", first);
    check_gradients(&rows, view, layout, scratch.get(), at + " gradient", first);

    bad = BadRows();
    std::unique_ptr<int64_t[]> exact(new int64_t[size_t(dim + kNumFactors)]());
    table.transformed_moments[dtype](rows.range(), view, exact.get(), scratch.get(), &bad);
    check_bad(bad, expected.bad, at + " transformed_moments");
    std::vector<int64_t> found(size_t(dim), 0);
    vectors.add_up(exact.get(), found.data());
    check_sums(found, expected.mapped, at + " transformed_moments");
    if (first) mapped_sums = found;
    CHECK(found == mapped_sums, "%s: the sums of mapped rows depend on the layout", at.c_str());

    for (int to = 0; to < kNumDtypes; ++to)
      for (const bool nontemporal : {false, true})
        // Outputs in every layout of their own would be many: the plain one, and that of the rows.
        for (const Layout& out_layout : {kLayouts[0], layout, Layout{64 - layout.offset, 0}}) {
          Block result(count, dim, Dtype(to), out_layout);
          bad = BadRows();
          table.row_transform[dtype][to](rows.range(), maps, result.data(), result.stride(), nontemporal, scratch.get(),
                                         &bad);
          check_bad(bad, expected.bad, at + " row_transform");
          check_out(&result, Dtype(to), at + (nontemporal ? " nontemporal" : "") + " row_transform", first);
        }
    bad = BadRows();
    table.row_transform[dtype][dtype](rows.range(), maps, rows.data(), rows.stride(), false, scratch.get(), &bad);
    check_bad(bad, expected.bad, at + " row_transform in place");
    check_out(&rows, dtype, at + " row_transform in place", false);
  }

  // Values are compared in Python; here: the same bits in any layout, zeros for bad rows, nothing else touched.
  void check_gradients(Block* rows, const Map& view, Layout layout, double* scratch, const std::string& at,
                       bool first) {
    for (int from = 0; from < kNumDtypes; ++from) {
      Block grad(count, dim, Dtype(from), layout), result(count, dim, dtype, layout);
      Random random(9);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < dim; ++j) encode(random.uniform(), Dtype(from), grad.at(i, j));
      table.row_transform_backward[dtype][from](rows->range(), grad.data(), grad.stride(), view, result.data(),
                                                result.stride(), scratch);
      result.check_gaps();
      for (int64_t i = 0; i < count; ++i) {
        const std::string bits(result.at(i, 0), size_t(dim * kItemsize[dtype]));
        if (first) gradients[from].push_back(bits);
        CHECK(bits == gradients[from][size_t(i)], "%s by %s: row %lld depends on the layout", at.c_str(),
              kDtypeNames[from], (long long)i);
        for (int64_t j = 0; j < dim && !expected.good[size_t(i)]; ++j)
          CHECK(decode(result.at(i, j), dtype) == 0, "%s: bad row %lld", at.c_str(), (long long)i);
      }
    }
  }

  void check_moments(Block* rows, double* scratch, const std::string& at, bool first) {
    AlignedVector<float> projection(dim + kPadding);
    Random random(7);
    for (int64_t j = 0; j < dim; ++j) projection.data()[j] = float(random.uniform());
    for (const bool with_keys : {true, false}) {
      BadRows bad;
      std::unique_ptr<int64_t[]> exact(new int64_t[size_t(dim)]());
      std::unique_ptr<uint64_t[]> exact_keys(new uint64_t[size_t(count)]);
      table.moments[dtype](rows->range(), exact.get(), with_keys ? exact_keys.get() : nullptr,
                           with_keys ? projection.data() : nullptr, nullptr, scratch, &bad);
      check_bad(bad, expected.bad, at);
      const std::vector<int64_t> found(exact.get(), exact.get() + dim);
      check_sums(found, expected.units, at);
      if (first && with_keys) sums = found;
      CHECK(found == sums, "%s: the sums depend on the layout or on the keys", at.c_str());
      if (!with_keys) continue;
      const std::vector<uint64_t> found_keys(exact_keys.get(), exact_keys.get() + count);
      for (int64_t i = 0; i < count; ++i)
        CHECK((found_keys[size_t(i)] != 0) == expected.good[size_t(i)], "%s: key of row %lld", at.c_str(),
              (long long)i);
      if (first) keys = found_keys;
      CHECK(found_keys == keys, "%s: the keys depend on the layout", at.c_str());
    }
    check_panels(rows, scratch, at + " to panels");
  }

  // Unit rows less a pilot, and the sums as without panels.
  void check_panels(Block* rows, double* scratch, const std::string& at) {
    const int64_t width = table.panel_width, num_panels = (dim + kTileSide - 1) / kTileSide * kTileSide / width;
    const std::unique_ptr<float[]> data(new float[size_t(num_panels * width * count)]);
    std::vector<double> pilot;
    AlignedVector<float> minus_pilot(dim + kPadding);
    Random random(8);
    for (int64_t j = 0; j < dim; ++j) {
      pilot.push_back(double(float(random.uniform())));
      minus_pilot.data()[j] = -float(pilot.back());
    }
    const Panels panels{data.get(), width, width * count, pilot.data(), minus_pilot.data()};
    std::unique_ptr<int64_t[]> exact(new int64_t[size_t(dim)]());
    BadRows bad;
    table.moments[dtype](rows->range(), exact.get(), nullptr, nullptr, &panels, scratch, &bad);
    check_bad(bad, expected.bad, at);
    CHECK(std::vector<int64_t>(exact.get(), exact.get() + dim) == sums, "%s: other sums", at.c_str());
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < dim; ++j) {
        const double found = double(data[size_t(j / width * panels.stride + i * width + j % width)]);
        const double wanted = expected.good[size_t(i)] ? expected.units[size_t(i)][size_t(j)] - pilot[size_t(j)] : 0;
        CHECK(std::fabs(found - wanted) <= 3e-7, "%s: element (%lld, %lld) is %.9g, expected %.9g", at.c_str(),
              (long long)i, (long long)j, found, wanted);
      }
  }

  void check_out(Block* result, Dtype to, const std::string& at, bool first) {
    result->check_gaps();
    for (int64_t i = 0; i < count; ++i) {
      const std::string bits(result->at(i, 0), size_t(dim * kItemsize[to]));
      if (first && out[to].size() == size_t(i)) {
        out[to].push_back(bits);
        check_row(result, to, i, at);
      }
      CHECK(bits == out[to][size_t(i)], "%s to %s: row %lld depends on the layout", at.c_str(), kDtypeNames[to],
            (long long)i);
    }
  }

  void check_row(Block* result, Dtype to, int64_t i, const std::string& at) {
    for (int64_t j = 0; j < dim; ++j) {
      const double found = decode(result->at(i, j), to), wanted = expected.mapped[size_t(i)][size_t(j)];
      CHECK(std::fabs(found - wanted) <= (expected.good[size_t(i)] ? kTolerance[to] : 0),
            "%s to %s: element (%lld, %lld) is %.17g, expected %.17g", at.c_str(), kDtypeNames[to], (long long)i,
            (long long)j, found, wanted);
    }
  }
};

void test_table(const KernelTable& table) {
  for (const int64_t dim : kDims)
    for (const int64_t count : kCounts)
      for (int type = 0; type < kNumDtypes; ++type)
        for (int contents = 0; contents < kNumContents; ++contents) {
          const Dtype dtype = Dtype(type);
          const std::vector<double> values = make_values(count, dim, dtype, Contents(contents));
          // A map for each kind of contents, and all of them for the plain one.
          for (int kind = 0; kind < (contents == kPlain ? int(kNumMaps) : 1); ++kind) {
            Block rows(count, dim, dtype, {0, 0});
            for (int64_t i = 0; i < count; ++i)
              for (int64_t j = 0; j < dim; ++j) encode(values[size_t(i * dim + j)], dtype, rows.at(i, j));
            std::vector<double> first_row(values.begin(), values.begin() + (count ? dim : 0));
            project(&first_row);
            const TestMap map = make_map(dim, MapKind(kind), first_row);
            const Expected expected = expected_of(&rows, count, dim, dtype, map);
            Case one{table, dtype, count, dim, Contents(contents), values, map, expected, {}, {}, {}, {}, {}};
            bool first = true;
            for (const Layout& layout : kLayouts) {
              one.run(layout, first);
              first = false;
            }
          }
        }
}

// The lower triangle, sums of at(k, i) at(k, j) over `count` rows beyond `start`; above it `start` stands as it was.
template <typename At>
void check_products(const char* name, int64_t count, int64_t dim, double start, double slack, const At& at,
                    const double* products) {
  for (int64_t i = 0; i < dim; ++i)
    for (int64_t j = 0; j < dim; ++j) {
      double wanted = start;
      for (int64_t k = 0; k < count && j <= i; ++k) wanted += at(k, i) * at(k, j);
      const double found = products[i * dim + j];
      CHECK(std::fabs(found - wanted) <= slack * double(count), "%s products %lldx%lld (%lld, %lld): %.9g, %.9g", name,
            (long long)count, (long long)dim, (long long)i, (long long)j, found, wanted);
    }
}

// One tile after the other, in sums of several lengths; what lies above the diagonal stays as it is.
void test_products(const KernelTable& table) {
  Random random(11);
  for (const int64_t dim : {1, 5, 47, 48, 49, 100})
    for (const int64_t count : {0, 1, 4, 37, 300}) {
      const int64_t width = table.panel_width, num_tiles = (dim + kTileSide - 1) / kTileSide;
      const int64_t stride = width * count;
      const std::unique_ptr<float[]> panels(new float[size_t(num_tiles * kTileSide * count)]);
      for (int64_t k = 0; k < num_tiles * kTileSide * count; ++k) panels[size_t(k)] = float(random.uniform());
      const auto at = [&](int64_t i, int64_t j) {
        return double(panels[size_t(j / width * stride + i * width + j % width)]);
      };
      for (const SumLengths lengths : {SumLengths{4, 16}, SumLengths{28, 28}, SumLengths{128, 1024}}) {
        const std::unique_ptr<double[]> products(new double[size_t(dim * dim)]);
        for (int64_t k = 0; k < dim * dim; ++k) products[size_t(k)] = 0.5;
        for (int64_t row = 0; row < num_tiles; ++row)
          for (int64_t column = 0; column <= row; ++column)
            table.products(panels.get(), stride, count, lengths, row, column, dim, products.get());
        check_products(table.name, count, dim, 0.5, 2e-7, at, products.get());
      }
    }
}

// The nearest bfloat16, as a number.
double nearest_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  std::memcpy(&value, &bits, sizeof value);
  return double(value);
}

void test_fast_products(const FastKernels& kernels) {
  Random random(12);
  for (const int64_t dim : {1, 47, 49, 100})
    for (const int64_t count : {1, 2, 37, 300}) {
      const int64_t width = kernels.panel_width, num_tiles = (dim + kTileSide - 1) / kTileSide;
      const int64_t num_panels = num_tiles * kTileSide / width, words = kernels.pair_words(count);
      const std::unique_ptr<float[]> panels(new float[size_t(num_panels * width * count)]);
      const std::unique_ptr<uint32_t[]> pairs(new uint32_t[size_t(num_panels * words)]);
      for (int64_t k = 0; k < num_panels * width * count; ++k) panels[size_t(k)] = float(random.uniform());
      for (int64_t panel = 0; panel < num_panels; ++panel)
        kernels.to_pairs(panels.get() + panel * width * count, count, pairs.get() + panel * words);
      const auto at = [&](int64_t i, int64_t j) {
        return nearest_bfloat16(panels[size_t((j / width * count + i) * width + j % width)]);
      };
      const std::unique_ptr<double[]> products(new double[size_t(dim * dim)]());
      for (int64_t row = 0; row < num_tiles; ++row)
        for (int64_t column = 0; column <= row; ++column)
          kernels.products(pairs.get(), words, (count + 1) / 2, {16, 64}, row, column, dim, products.get());
      check_products("fast", count, dim, 0, 3e-7, at, products.get());
    }
}

void test_streams(const KernelTable& table) {
  Random random(5);
  for (const int64_t size : {0, 1, 15, 63, 64, 65, 255, 256, 257, 1000, 4097})
    for (const int64_t offset : {0, 1, 4, 63}) {
      const std::unique_ptr<char[]> source(new char[size_t(size + offset)]);
      const std::unique_ptr<char[]> target(new char[size_t(size + offset)]);
      for (int64_t at = 0; at < size + offset; ++at) source[size_t(at)] = char(random.bits());
      table.stream_read(source.get() + offset, size);
      for (const bool nontemporal : {false, true}) {
        std::memset(target.get(), 0, size_t(size + offset));
        table.stream_copy(source.get() + offset, target.get() + offset, size, nontemporal);
        CHECK(std::memcmp(source.get() + offset, target.get() + offset, size_t(size)) == 0, "%s %lld bytes", table.name,
              (long long)size);
        for (int64_t at = 0; at < offset; ++at) CHECK(target[size_t(at)] == 0, "%s wrote before", table.name);
      }
    }
}

// Rows taken from the last to the first, mapped and as they are, against `mapped`, in which row 17000 alone is bad.
void test_taken(const Rows& rows, const RowMap& map, Block& mapped, int num_threads) {
  const int64_t count = rows.range.num_rows, row_bytes = rows.range.dim * kItemsize[rows.dtype];
  std::vector<int64_t> numbers;
  for (int64_t i = 0; i < count; ++i) numbers.push_back(count - 1 - i);
  for (const RowMap* each : {&map, static_cast<const RowMap*>(nullptr)}) {
    Block taken(count, rows.range.dim, rows.dtype, {0, 0});
    const BadRows bad = take_rows(rows, numbers.data(), {taken.range(), rows.dtype}, each, num_threads);
    CHECK(bad.first == (each ? count - 1 - 17000 : -1) && bad.num_nonfinite == (each ? 1 : 0), "%d threads",
          num_threads);
    for (int64_t i = 0; i < count; ++i) {
      const char* const expected = each ? mapped.data() + numbers[size_t(i)] * mapped.stride()
                                        : rows.range.data + numbers[size_t(i)] * rows.range.stride;
      CHECK(std::memcmp(taken.data() + i * row_bytes, expected, size_t(row_bytes)) == 0, "row %lld", (long long)i);
    }
  }
}

// The same bits on one thread and on several, and bad rows at their own numbers.
void test_threads() {
  constexpr int64_t kCount = 20001, kDim = 65;
  Block rows(kCount, kDim, kFloat32, {4, 12});
  Random random(6);
  for (int64_t i = 0; i < kCount; ++i)
    for (int64_t j = 0; j < kDim; ++j) encode(i == 17000 ? std::nan("") : random.uniform(), kFloat32, rows.at(i, j));
  const TestMap map = make_map(kDim, kUsual, {});
  const RowMap vectors(map.scale, map.shift.data(), map.correction.data(), kDim);
  const Rows seen{rows.range(), kFloat32};
  std::vector<int64_t> sums[2];
  std::vector<uint64_t> keys[2];
  std::vector<double> products[2];
  std::string out[2];
  for (const int run : {0, 1}) {
    const int num_threads = run ? 4 : 1;
    sums[run].assign(kDim + kNumFactors, 0);
    keys[run].assign(kCount, 1);
    Block result(kCount, kDim, kFloat32, {0, 0});
    for (const BadRows& bad :
         {moments(seen, sums[run].data(), keys[run].data(), nullptr, num_threads),
          transformed_moments(seen, vectors, sums[run].data(), num_threads),
          row_transform(seen, {&vectors}, nullptr, result.data(), result.stride(), kFloat32, num_threads),
          find_bad_rows(seen, num_threads)}) {
      CHECK(bad.first == 17000 && bad.num_nonfinite == 1 && bad.num_zero == 0, "%d threads", num_threads);
    }
    products[run].assign(kDim * kDim, 0);
    std::vector<int64_t> with_products(kDim, 0);
    const BadRows bad = covariance(seen, map.shift.data(), with_products.data(), nullptr, products[run].data(), 5,
                                   nullptr, num_threads);
    CHECK(bad.first == 17000 && bad.num_nonfinite == 1, "%d threads", num_threads);
    out[run].assign(result.data(), size_t(kCount * result.stride()));
    test_taken(seen, vectors, result, num_threads);
  }
  CHECK(sums[0] == sums[1], "sums depend on the threads");
  CHECK(products[0] == products[1], "products depend on the threads");
  CHECK(keys[0] == keys[1] && keys[0][17000] == 0, "keys depend on the threads");
  CHECK(out[0] == out[1], "rows depend on the threads");
}

}  // namespace

int main() {
#ifdef REALIGN_TEST_TABLE
  CHECK(REALIGN_TEST_TABLE != nullptr, "this build lacks the table");
  const std::vector<const KernelTable*> tables = {REALIGN_TEST_TABLE};
#else
  const std::vector<const KernelTable*> tables = available_tables();
#endif
  for (const KernelTable* table : tables) {
    test_table(*table);
    test_products(*table);
    test_streams(*table);
    std::printf("kernels: %s passed\n", table->name);
  }
#ifdef REALIGN_TEST_FAST
  test_fast_products(*kAvx512Bf16);
  test_fast_products(*kAmx);
  std::puts("kernels: fast passed");
#endif
  for (const KernelTable* table : available_tables()) {
    use_table(table->name);
    if (const FastKernels* fast = fast_kernels()) test_fast_products(*fast);
    test_threads();
  }
  std::puts("kernels: threads passed");
}
