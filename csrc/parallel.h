// Threads that wait between calls, since starting one costs more than transforming a batch.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>

namespace realign {

// How many of `num_threads` are worth their while for so much work. A small batch is done sooner by one: beside torch,
// whose own threads hold their cores a while after each operation, a second one is late.
inline int useful_threads(int num_threads, int64_t num_units, int64_t num_bytes) {
  constexpr int64_t kBytesPerThread = 1 << 20;
  return int(std::max<int64_t>(1, std::min({int64_t(num_threads), num_units, num_bytes / kBytesPerThread})));
}

// Calls work(part) for part 0 on the calling thread and for parts 1 to `num_parts` - 1 on others, as far as there are
// any: a part that no thread has begun when part 0 returns is left out. Part 0 must therefore finish all of the work
// where nobody helps it.
void run_parts(int num_parts, const std::function<void(int)>& work);

// Ranges of [0, size) that go one by one to whoever is free, so that no thread waits for a slower one.
class Chunks {
 public:
  // Small enough to share a batch evenly, large enough that little of what is fetched ahead goes astray.
  Chunks(int64_t size, int64_t num_bytes, int num_parts, int64_t multiple) : size_(size), length_(size > 0 ? size : 1) {
    if (num_parts == 1) return;
    const int64_t bytes = std::clamp<int64_t>(num_bytes / (8 * num_parts), 32 << 10, 4 << 20);
    const int64_t length = int64_t(double(length_) * double(bytes) / double(std::max<int64_t>(num_bytes, 1)));
    length_ = std::max<int64_t>(1, (length + multiple - 1) / multiple) * multiple;
  }

  bool next(int64_t* begin, int64_t* end) {
    *begin = next_.fetch_add(length_, std::memory_order_relaxed);
    *end = std::min(size_, *begin + length_);
    return *begin < size_;
  }

 private:
  int64_t size_, length_;
  std::atomic<int64_t> next_{0};
};

}  // namespace realign
