#include "file_map.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <mutex>
#include <system_error>

namespace realign {
namespace {

// What the handler of signals looks at, so without locks. There are as many maps as threads that read files.
struct Slot {
  std::atomic<uintptr_t> begin{0}, end{0};
  std::atomic<bool> broken{false};
};
constexpr int kNumSlots = 4096;
Slot slots[kNumSlots];
std::atomic<int> num_used{0};  // of the first slots, some may be free again
std::mutex taking;

struct sigaction before;

void on_bus_error(int signal, siginfo_t* info, void* context) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(info->si_addr);
  const int used = num_used.load();
  for (int i = 0; i < used; ++i) {
    Slot& slot = slots[i];
    const uintptr_t begin = slot.begin.load(), end = slot.end.load();
    if (begin == 0 || at < begin || at >= end) continue;
    const uintptr_t page = at / uintptr_t(getpagesize()) * uintptr_t(getpagesize());
    const int saved = errno;
    void* zeros =
        mmap(reinterpret_cast<void*>(page), end - page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    errno = saved;
    if (zeros == MAP_FAILED) break;
    slot.broken.store(true);
    return;
  }
  if (before.sa_flags & SA_SIGINFO)
    before.sa_sigaction(signal, info, context);
  else if (before.sa_handler == SIG_DFL)
    sigaction(SIGBUS, &before, nullptr);  // the instruction is tried again, and ends the process
  else if (before.sa_handler != SIG_IGN)
    before.sa_handler(signal);
}

int take_slot(uintptr_t begin, uintptr_t end) {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action = {};
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, &before);
  });
  const std::lock_guard<std::mutex> lock(taking);
  for (int i = 0; i < kNumSlots; ++i) {
    if (slots[i].begin.load() != 0) continue;
    slots[i].broken.store(false);
    slots[i].end.store(end);
    slots[i].begin.store(begin);
    if (i >= num_used.load()) num_used.store(i + 1);
    return i;
  }
  return -1;
}

}  // namespace

FileMap::FileMap(int fd, int64_t offset, int64_t size) : size_(size) {
  const int64_t page = getpagesize();
  const int64_t before_data = offset % page;
  mapped_ = size + before_data;
  void* begin = mmap(nullptr, size_t(mapped_), PROT_READ, MAP_SHARED, fd, off_t(offset - before_data));
  if (begin == MAP_FAILED) throw std::system_error(errno, std::generic_category());
  begin_ = static_cast<char*>(begin);
  data_ = begin_ + before_data;
  const uintptr_t address = reinterpret_cast<uintptr_t>(begin);
  slot_ = take_slot(address, address + uintptr_t(mapped_));
  if (slot_ < 0) {
    munmap(begin_, size_t(mapped_));
    throw std::system_error(EMFILE, std::generic_category());
  }
}

FileMap::~FileMap() {
  slots[slot_].begin.store(0);
  munmap(begin_, size_t(mapped_));
}

bool FileMap::broken() const { return slots[slot_].broken.load(); }

}  // namespace realign
