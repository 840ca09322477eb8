// Threads that wait between calls, since starting one costs more than transforming a batch.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

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

// Calls `work`, which must not throw, on a thread that has nothing to do, and does not wait for it; here, where there
// is none.
void run_later(std::function<void()> work);

// Calls work(part, begin, end) on ranges of [0, size) that begin at multiples of `multiple`. Each part has a share of
// its own, the same in every call of one size, so that it finds in its cache what it left there; then it helps with the
// others', so that no thread waits for a slower one. What one part is given at once, one thread does: about a share of
// 1 / `pieces` of its own.
template <typename Work>
void parallel_for(int num_parts, int64_t size, int64_t unit_bytes, int64_t multiple, const Work& work,
                  int64_t pieces = 16) {
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  // Small enough to share a batch evenly, large enough that little of what is fetched ahead goes astray.
  const int64_t bytes = std::clamp<int64_t>(size * unit_bytes / (pieces * num_parts), 32 << 10, 4 << 20);
  const int64_t length = num_parts == 1 ? size : (bytes / unit_bytes / multiple + 1) * multiple;
  const int64_t share = (size / num_parts / multiple + 1) * multiple;
  std::vector<Share> shares(static_cast<size_t>(num_parts));
  for (size_t part = 0; part < shares.size(); ++part) {
    shares[part].next = share * int64_t(part);
    shares[part].end = std::min(size, share * int64_t(part + 1));
  }
  run_parts(num_parts, [&](int part) {
    for (int step = 0; step < num_parts; ++step) {
      Share& from = shares[size_t((part + step) % num_parts)];
      for (int64_t begin; (begin = from.next.fetch_add(length, std::memory_order_relaxed)) < from.end;)
        work(part, begin, std::min(from.end, begin + length));
    }
  });
}

}  // namespace realign
