#include "file_read.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "parallel.h"

namespace realign {
namespace {

// macOS refuses to read 2 GiB at once, and Linux does not.
constexpr int64_t kMostBytes = 1 << 30;

int64_t read_range(int fd, char* data, int64_t size, int64_t offset) {
  int64_t done = 0;
  while (done < size) {
    const size_t wanted = size_t(std::min(size - done, kMostBytes));
    const ssize_t count = pread(fd, data + done, wanted, off_t(offset + done));
    if (count == 0) break;
    if (count > 0)
      done += count;
    else if (errno != EINTR)
      throw std::system_error(errno, std::generic_category());
  }
  return done;
}

}  // namespace

int64_t read_file(int fd, char* data, int64_t size, int64_t offset, int num_threads) {
  constexpr int64_t kPage = 4096;
  std::atomic<int64_t> total{0};
  parallel_for(useful_threads(num_threads, size, size), size, 1, kPage, [&](int, int64_t begin, int64_t end) {
    total += read_range(fd, data + begin, end - begin, offset + begin);
  });
  return total;
}

int64_t read_rows(const int32_t* fds, const int64_t* offsets, int64_t num_rows, int64_t row_bytes, char* data,
                  int num_threads) {
  std::atomic<int64_t> first_short{num_rows};
  const int threads = useful_threads(num_threads, num_rows, num_rows * row_bytes);
  parallel_for(threads, num_rows, row_bytes, 1, [&](int, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (read_range(fds[row], data + row * row_bytes, row_bytes, offsets[row]) == row_bytes) continue;
      int64_t first = first_short.load();
      while (row < first && !first_short.compare_exchange_weak(first, row)) {
      }
    }
  });
  return first_short.load();
}

}  // namespace realign
