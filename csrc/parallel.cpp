#include "parallel.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace realign {
namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Worker;
void give_back(Worker* worker);

// One thread, and the part it is asked to do. Both sides look for a change for a moment before they sleep: a batch is
// often followed by the next within microseconds, and waking a thread takes tens of them.
class Worker {
 public:
  Worker() {
    std::thread([this] { serve(); }).detach();
  }

  void ask(const std::function<void(int)>* work, int part) {
    work_ = work;
    part_ = part;
    change(kAsked);
  }

  // Asks for what nobody waits for, and what does not throw: the worker then goes back to the others by itself.
  void hand_over(std::function<void()> work) {
    alone_ = std::move(work);
    ask(nullptr, 0);
  }

  // Returns once the part is done, or certain never to begin; then what it threw, if anything.
  std::exception_ptr finish() {
    State asked = kAsked;
    if (!state_.compare_exchange_strong(asked, kIdle)) {
      wait_for(kDone);
      state_.store(kIdle);
    }
    return std::exchange(error_, nullptr);
  }

 private:
  enum State { kIdle, kAsked, kAtWork, kDone };

  void serve() {
    for (;;) {
      wait_for(kAsked);
      State asked = kAsked;
      if (!state_.compare_exchange_strong(asked, kAtWork)) continue;
      if (work_ == nullptr) {
        std::exchange(alone_, nullptr)();
        state_.store(kIdle);
        give_back(this);
        continue;
      }
      try {
        (*work_)(part_);
      } catch (...) {
        error_ = std::current_exception();
      }
      change(kDone);
    }
  }

  void change(State state) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      state_.store(state);
    }
    changed_.notify_one();
  }

  void wait_for(State state) {
    const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(100);
    do {
      for (int i = 0; i < 64; ++i, pause())
        if (state_.load() == state) return;
    } while (std::chrono::steady_clock::now() < until);
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return state_.load() == state; });
  }

  std::atomic<State> state_{kIdle};
  const std::function<void(int)>* work_ = nullptr;
  int part_ = 0;
  std::function<void()> alone_;
  std::exception_ptr error_;
  std::mutex mutex_;
  std::condition_variable changed_;
};

// Workers nobody uses at present. Neither they nor the list are ever destroyed: they may be at rest in a wait when the
// process ends.
class Pool {
 public:
  std::vector<Worker*> take(int count) {
    const std::lock_guard<std::mutex> lock(mutex_);
    try {
      for (int missing = count - int(idle_.size()); missing > 0; --missing) {
        idle_.reserve(idle_.size() + 1);
        idle_.push_back(new Worker);
      }
    } catch (const std::system_error&) {  // the system gives no more threads
    }
    const auto first = idle_.end() - std::min<std::ptrdiff_t>(count, std::ptrdiff_t(idle_.size()));
    const std::vector<Worker*> taken(first, idle_.end());
    idle_.erase(first, idle_.end());
    return taken;
  }

  // One that is there already, or null.
  Worker* take_idle() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (idle_.empty()) return nullptr;
    Worker* const taken = idle_.back();
    idle_.pop_back();
    return taken;
  }

  void give_back(const std::vector<Worker*>& workers) {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.insert(idle_.end(), workers.begin(), workers.end());
  }

 private:
  std::mutex mutex_;
  std::vector<Worker*> idle_;
};

Pool* current_pool = nullptr;

Pool& pool() {
  // A forked child has none of its parent's threads and may find the parent's lock taken: it gets a pool of its own.
  static std::once_flag once;
  std::call_once(once, [] {
    current_pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] { current_pool = new Pool; });
  });
  return *current_pool;
}

void give_back(Worker* worker) { pool().give_back({worker}); }

}  // namespace

void run_later(std::function<void()> work) {
  Worker* const worker = pool().take_idle();
  if (worker == nullptr) return work();
  worker->hand_over(std::move(work));
}

void run_parts(int num_parts, const std::function<void(int)>& work) {
  if (num_parts == 1) return work(0);
  const std::vector<Worker*> workers = pool().take(num_parts - 1);
  for (size_t i = 0; i < workers.size(); ++i) workers[i]->ask(&work, int(i) + 1);
  std::exception_ptr error;
  try {
    work(0);
  } catch (...) {
    error = std::current_exception();
  }
  for (Worker* worker : workers) {
    const std::exception_ptr theirs = worker->finish();
    if (!error) error = theirs;
  }
  pool().give_back(workers);
  if (error) std::rethrow_exception(error);
}

}  // namespace realign
