// Each chunk is done once, by whomever; what a part throws reaches the caller; callers at once do not meet, nor what
// nobody waits for.
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"
#include "parallel.h"

namespace {

using realign::parallel_for;
using realign::run_later;
using realign::run_parts;

void count_each(int64_t size, int num_parts, int64_t multiple) {
  std::vector<std::atomic<int>> seen(static_cast<size_t>(size));
  parallel_for(num_parts, size, 3000, multiple, [&](int part, int64_t begin, int64_t end) {
    CHECK(part >= 0 && part < num_parts, "part %d of %d", part, num_parts);
    CHECK(begin % multiple == 0 && (end % multiple == 0 || end == size), "from %lld to %lld", (long long)begin,
          (long long)end);
    for (int64_t i = begin; i < end; ++i) ++seen[size_t(i)];
  });
  for (int64_t i = 0; i < size; ++i)
    CHECK(seen[size_t(i)] == 1, "%lld done %d times", (long long)i, int(seen[size_t(i)]));
}

void test_chunks() {
  for (const int64_t size : {0, 1, 7, 8, 9, 1000, 20011})
    for (const int num_parts : {1, 2, 5})
      for (const int64_t multiple : {1, 8}) count_each(size, num_parts, multiple);
}

void test_errors() {
  for (int thrower = 0; thrower < 3; ++thrower) {
    std::atomic<int> begun{0};
    bool caught = false;
    try {
      run_parts(3, [&](int part) {
        ++begun;
        while (begun < 3) std::this_thread::yield();
        if (part == thrower) throw std::runtime_error("of this part");
      });
    } catch (const std::runtime_error&) {
      caught = true;
    }
    CHECK(caught, "part %d", thrower);
  }
}

// With pauses, after which the threads must be woken.
void test_callers_at_once() {
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller)
    callers.emplace_back([caller] {
      for (int call = 0; call < 300; ++call) {
        count_each(50 + 37 * caller, 3, 8);
        if (call % 50 == 0) std::this_thread::sleep_for(std::chrono::microseconds(300));
      }
    });
  for (std::thread& thread : callers) thread.join();
}

// More at once than there are threads, and between calls that want the same threads.
void test_later() {
  constexpr int kCalls = 200;
  std::atomic<int> done{0};
  for (int call = 0; call < kCalls; ++call) {
    for (int more = 0; more < 3; ++more) run_later([&done] { ++done; });
    if (call % 2 == 0) count_each(500, 3, 8);
    if (call % 50 == 0) std::this_thread::sleep_for(std::chrono::microseconds(300));
  }
  while (done < 3 * kCalls) std::this_thread::yield();
}

}  // namespace

int main() {
  test_later();  // without other threads
  test_chunks();
  test_errors();
  test_callers_at_once();
  test_later();
  std::puts("parallel: passed");
}
