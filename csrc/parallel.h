// Threads that wait between calls, since starting one costs more than transforming a batch.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>

namespace realign {

// How many of `num_threads` are worth their while for so much work: waking one costs about as much as a few dozen
// kilobytes, and beside torch, whose own threads hold their cores a while after each operation, it may come late.
inline int useful_threads(int num_threads, int64_t num_units, int64_t num_bytes) {
  constexpr int64_t kBytesPerThread = 1 << 18;
  return int(std::max<int64_t>(1, std::min({int64_t(num_threads), num_units, num_bytes / kBytesPerThread})));
}

// Calls work(part) for part 0 on the calling thread and for parts 1 to `num_parts` - 1 on others, as far as there are
// any: a part that no thread has begun when part 0 returns is left out. Part 0 must therefore finish all of the work
// where nobody helps it.
void run_parts(int num_parts, const std::function<void(int)>& work);

// Calls work(part, begin, end) on ranges of [0, size) that begin at multiples of `multiple`, each going to whoever of
// `num_parts` is free, so that no thread waits for a slower one. What one part is given, one thread does.
template <typename Work>
void parallel_for(int num_parts, int64_t size, int64_t unit_bytes, int64_t multiple, const Work& work) {
  int64_t length = size;
  if (num_parts > 1) {
    // Small enough to share a batch evenly, large enough that little of what is fetched ahead goes astray.
    const int64_t bytes = std::clamp<int64_t>(size * unit_bytes / (8 * num_parts), 32 << 10, 4 << 20);
    length = (bytes / unit_bytes / multiple + 1) * multiple;
  }
  std::atomic<int64_t> next{0};
  run_parts(num_parts, [&](int part) {
    for (int64_t begin; (begin = next.fetch_add(length, std::memory_order_relaxed)) < size;)
      work(part, begin, std::min(size, begin + length));
  });
}

}  // namespace realign
