#include "dispatch.h"

#include <atomic>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace realign {
namespace {

bool runs_here(const KernelTable* table) {
  if (table == nullptr) return false;
#if defined(__x86_64__)
  // These ask the operating system too, whether it keeps the wide registers.
  if (table == kAvx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (table == kAvx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("f16c");
#endif
  return true;
}

#if defined(__x86_64__)
// The processor has the unit, and Linux lets this process keep its registers, which it wants to be asked for.
bool has_matrix_unit() {
#if defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTiles) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::atomic<const KernelTable*>& chosen() {
  static std::atomic<const KernelTable*> table{available_tables().back()};
  return table;
}

}  // namespace

const std::vector<const KernelTable*>& available_tables() {
  static const std::vector<const KernelTable*> tables = [] {
    std::vector<const KernelTable*> found;
    for (const KernelTable* table : {kBaseline, kAvx2, kAvx512, kNeon})
      if (runs_here(table)) found.push_back(table);
    return found;
  }();
  return tables;
}

const FastKernels* fast_kernels() {
#if defined(__x86_64__)
  static const FastKernels* const found = has_matrix_unit()                      ? kAmx
                                          : __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16
                                                                                 : nullptr;
  if (&current_table() == kAvx512) return found;
#endif
  return nullptr;
}

const KernelTable& current_table() { return *chosen().load(std::memory_order_relaxed); }

void use_table(const std::string& name) {
  std::string names = "auto";
  for (const KernelTable* table : available_tables()) {
    if (name == table->name || (name == "auto" && table == available_tables().back())) {
      chosen().store(table, std::memory_order_relaxed);
      return;
    }
    names += std::string(", ") + table->name;
  }
  throw std::invalid_argument("instruction set must be one of " + names + " on this processor, got '" + name + "'");
}

}  // namespace realign
