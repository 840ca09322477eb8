// Threads made per call: nothing of them is left when a process forks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace realign {

// How many of `num_threads` are worth their start for so much work.
inline int useful_threads(int num_threads, int64_t num_rows, int64_t num_bytes) {
  constexpr int64_t kBytesPerThread = 1 << 20;
  return int(std::max<int64_t>(1, std::min({int64_t(num_threads), num_rows, num_bytes / kBytesPerThread})));
}

// Calls work(part, begin, end) for `num_parts` equal ranges of [0, size), the last on the calling thread. Where the
// system gives no thread, the calling one does the part.
template <typename Work>
void parallel_for(int num_parts, int64_t size, const Work& work) {
  std::vector<std::exception_ptr> errors(size_t(num_parts), nullptr);
  const auto run = [&](int part) noexcept {
    const int64_t begin = int64_t(__int128(size) * part / num_parts);
    const int64_t end = int64_t(__int128(size) * (part + 1) / num_parts);
    try {
      work(part, begin, end);
    } catch (...) {
      errors[size_t(part)] = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  threads.reserve(size_t(num_parts));
  for (int part = 0; part + 1 < num_parts; ++part) {
    try {
      threads.emplace_back(run, part);
    } catch (const std::system_error&) {
      run(part);
    }
  }
  run(num_parts - 1);
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors)
    if (error) std::rethrow_exception(error);
}

}  // namespace realign
