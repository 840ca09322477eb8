// XXH64, the 64-bit xxHash, streaming; written from its public specification.
#pragma once

#include <cstdint>
#include <cstring>

namespace realign {

class Xxh64 {
 public:
  explicit Xxh64(uint64_t seed = 0)
      : seed_(seed), lanes_{seed + kPrime1 + kPrime2, seed + kPrime2, seed, seed - kPrime1} {}

  void update(const unsigned char* data, uint64_t size) {
    if (size == 0) return;
    total_ += size;
    if (kept_ + size < kStripe) {
      std::memcpy(stripe_ + kept_, data, size);
      kept_ += size;
      return;
    }
    if (kept_ > 0) {
      const uint64_t missing = kStripe - kept_;
      std::memcpy(stripe_ + kept_, data, missing);
      consume(stripe_);
      data += missing;
      size -= missing;
    }
    for (; size >= kStripe; data += kStripe, size -= kStripe) consume(data);
    std::memcpy(stripe_, data, size);
    kept_ = size;
  }

  uint64_t digest() const {
    uint64_t hash = seed_ + kPrime5;
    if (total_ >= kStripe) {
      hash = rotate(lanes_[0], 1) + rotate(lanes_[1], 7) + rotate(lanes_[2], 12) + rotate(lanes_[3], 18);
      for (const uint64_t lane : lanes_) hash = (hash ^ round(0, lane)) * kPrime1 + kPrime4;
    }
    hash += total_;
    const unsigned char* at = stripe_;
    const unsigned char* const end = stripe_ + kept_;
    for (; at + 8 <= end; at += 8) hash = rotate(hash ^ round(0, word<uint64_t>(at)), 27) * kPrime1 + kPrime4;
    if (at + 4 <= end) {
      hash = rotate(hash ^ (word<uint32_t>(at) * kPrime1), 23) * kPrime2 + kPrime3;
      at += 4;
    }
    for (; at < end; ++at) hash = rotate(hash ^ (*at * kPrime5), 11) * kPrime1;
    hash = (hash ^ (hash >> 33)) * kPrime2;
    hash = (hash ^ (hash >> 29)) * kPrime3;
    return hash ^ (hash >> 32);
  }

 private:
  static constexpr uint64_t kPrime1 = 0x9E3779B185EBCA87, kPrime2 = 0xC2B2AE3D27D4EB4F, kPrime3 = 0x165667B19E3779F9,
                            kPrime4 = 0x85EBCA77C2B2AE63, kPrime5 = 0x27D4EB2F165667C5;
  static constexpr uint64_t kStripe = 32;

  static uint64_t rotate(uint64_t x, int bits) { return (x << bits) | (x >> (64 - bits)); }
  static uint64_t round(uint64_t lane, uint64_t input) { return rotate(lane + input * kPrime2, 31) * kPrime1; }

  // The algorithm reads little-endian words, as every processor that this package is built for does.
  template <typename Word>
  static uint64_t word(const unsigned char* at) {
    Word value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }

  void consume(const unsigned char* stripe) {
    for (int lane = 0; lane < 4; ++lane) lanes_[lane] = round(lanes_[lane], word<uint64_t>(stripe + 8 * lane));
  }

  uint64_t seed_;
  uint64_t lanes_[4];
  unsigned char stripe_[kStripe];
  uint64_t kept_ = 0, total_ = 0;
};

}  // namespace realign
