// What the test programs share: CHECK prints and ends the program with 1, and random numbers that are the same
// everywhere.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#define CHECK(CONDITION, ...)                                                        \
  do {                                                                               \
    if (!(CONDITION)) {                                                              \
      std::fprintf(stderr, "%s:%d: not so: %s\n  ", __FILE__, __LINE__, #CONDITION); \
      std::fprintf(stderr, __VA_ARGS__);                                             \
      std::fprintf(stderr, "\n");                                                    \
      std::exit(1);                                                                  \
    }                                                                                \
  } while (0)

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t x = state_ += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }
  uint64_t below(uint64_t limit) { return bits() % limit; }
  double uniform() { return double(bits() >> 11) * 0x1p-52 - 1; }  // in [-1, 1)

 private:
  uint64_t state_;
};
