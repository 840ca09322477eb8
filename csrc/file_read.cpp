#include "file_read.h"

#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "parallel.h"

namespace realign {
namespace {

int64_t read_range(int fd, char* data, int64_t size, int64_t offset) {
  int64_t done = 0;
  while (done < size) {
    const ssize_t count = pread(fd, data + done, size_t(size - done), off_t(offset + done));
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

}  // namespace realign
