// Files as memory, and rows read and mapped in one pass: within their bounds, also where a file is cut short.
#include <unistd.h>

#include <cstdio>
#include <vector>

#include "check.h"
#include "file_map.h"
#include "file_transform.h"

using namespace realign;

namespace {

int temporary_file(const std::vector<float>& values) {
  std::FILE* file = std::tmpfile();
  CHECK(file != nullptr, "no temporary file can be made");
  const int fd = dup(fileno(file));
  std::fclose(file);
  CHECK(write(fd, values.data(), values.size() * sizeof(float)) == ssize_t(values.size() * sizeof(float)),
        "a file of known values");
  return fd;
}

void test_map() {
  const int64_t page = getpagesize(), size = 4 * page;
  const int fd = temporary_file(std::vector<float>(size_t(size) / sizeof(float), 1.0f));
  FileMap map(fd, 12, size - 12);
  CHECK(map.size() == size - 12, "a file of known values");
  CHECK(!map.broken(), "a file of known values");
  CHECK(ftruncate(fd, page) == 0, "a file of known values");
  float sum = 0;
  for (const char* at = map.data(); at < map.data() + map.size(); at += sizeof(float))
    sum += *reinterpret_cast<const float*>(at);
  CHECK(sum == float(page / int64_t(sizeof(float)) - 3), "a file of known values");
  CHECK(map.broken(), "a file of known values");
  close(fd);
}

void test_read_transform() {
  for (const int64_t dim : {1, 17, 300}) {
    const int64_t count = 1003;
    std::vector<float> values(size_t(count * dim));
    for (size_t i = 0; i < values.size(); ++i) values[i] = float(i % 97) - 48.5f;
    const std::vector<double> shift(size_t(dim), 0.01), correction(size_t(dim), -0.02);
    const RowMap map(1.1, shift.data(), correction.data(), dim);
    const int fd = temporary_file(values);
    std::vector<float> expected(values.size()), out(values.size());
    const Rows rows{{reinterpret_cast<char*>(values.data()), dim * 4, count, dim}, kFloat32};
    row_transform(rows, {&map}, nullptr, reinterpret_cast<char*>(expected.data()), dim * 4, kFloat32, 1);
    const Rows target{{reinterpret_cast<char*>(out.data()), dim * 4, count, dim}, kFloat32};
    int64_t num_read = 0;
    read_transform({nullptr, nullptr, fd, 0}, target, map, 3, &num_read);
    CHECK(num_read == count, "a file of known values");
    CHECK(out == expected, "a file of known values");
    std::vector<int32_t> fds(size_t(count), fd);
    std::vector<int64_t> offsets;
    for (int64_t i = 0; i < count; ++i) offsets.push_back(i * dim * 4);
    CHECK(ftruncate(fd, 500 * dim * 4 + 3) == 0, "a file of known values");
    read_transform({fds.data(), offsets.data(), -1, 0}, target, map, 3, &num_read);
    CHECK(num_read == 500, "a file of known values");
    close(fd);
  }
}

}  // namespace

int main() {
  test_map();
  test_read_transform();
  std::puts("files: passed");
}
