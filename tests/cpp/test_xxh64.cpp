// XXH64 against vectors of the reference implementation, in any chunks.
#include <cstring>
#include <memory>
#include <string>

#include "check.h"
#include "xxh64.h"

namespace {

uint64_t hash(const std::string& text, uint64_t seed, size_t chunk) {
  realign::Xxh64 state(seed);
  for (size_t at = 0; at < text.size(); at += chunk) {
    const size_t size = chunk < text.size() - at ? chunk : text.size() - at;
    // Its own block of exactly this size: a byte read too many is seen.
    const std::unique_ptr<unsigned char[]> block(new unsigned char[size]);
    std::memcpy(block.get(), text.data() + at, size);
    state.update(block.get(), size);
  }
  state.update(nullptr, 0);
  return state.digest();
}

std::string ramp(size_t size) {
  std::string text;
  for (size_t i = 0; i < size; ++i) text.push_back(char(i * 7 + i / 256));
  return text;
}

}  // namespace

int main() {
  const struct {
    std::string text;
    uint64_t seed, expected;
  } vectors[] = {
      {"", 0, 0xef46db3751d8e999u},
      {"", 1, 0xd5afba1336a3be4bu},
      {"a", 0, 0xd24ec4f1a98c6e5bu},
      {"abc", 0, 0x44bc2cf5ad770999u},
      {"Nobody inspects the spammish repetition", 0, 0xfbcea83c8a378bf1u},
      {ramp(3), 0u, 0x9ff70a635a6209abu},
      {ramp(3), 2654435761u, 0xecf3373c29e497d4u},
      {ramp(4), 0u, 0xae5acdc00a55ac41u},
      {ramp(4), 2654435761u, 0xba4a2450c7e2c0a9u},
      {ramp(7), 0u, 0xd734a6b26f3da63eu},
      {ramp(7), 2654435761u, 0x715684c16c5f65a5u},
      {ramp(8), 0u, 0x87116b3365b924ebu},
      {ramp(8), 2654435761u, 0x22e331c009171f74u},
      {ramp(12), 0u, 0x14b8433b9a14e611u},
      {ramp(12), 2654435761u, 0x412d850c301a22cfu},
      {ramp(31), 0u, 0x0f187c62b1e722b7u},
      {ramp(31), 2654435761u, 0xa2ba2580312f0f94u},
      {ramp(32), 0u, 0x91b0cb0931a8c629u},
      {ramp(32), 2654435761u, 0xba4945101354e701u},
      {ramp(33), 0u, 0x931b043cf8d65b94u},
      {ramp(33), 2654435761u, 0x1f245ed9dde2a6c8u},
      {ramp(63), 0u, 0x219110bf13e2fa26u},
      {ramp(63), 2654435761u, 0x7010506b304f24a3u},
      {ramp(64), 0u, 0xbf3052e3445775d0u},
      {ramp(64), 2654435761u, 0x7a368c1f823dfc0eu},
      {ramp(65), 0u, 0xed65e3510df3611du},
      {ramp(65), 2654435761u, 0x189134f6375d2629u},
      {ramp(101), 0u, 0x42312f4d55d9bd17u},
      {ramp(101), 2654435761u, 0x48395cd114743493u},
      {ramp(1000), 0u, 0x698399d62f9c1695u},
      {ramp(1000), 2654435761u, 0x54bf4105274d8346u},
  };
  for (const auto& vector : vectors)
    for (size_t chunk = 1; chunk <= vector.text.size() + 1; ++chunk) {
      const uint64_t found = hash(vector.text, vector.seed, chunk);
      CHECK(found == vector.expected, "%zu bytes, seed %llu, chunks of %zu: %016llx, expected %016llx",
            vector.text.size(), (unsigned long long)vector.seed, chunk, (unsigned long long)found,
            (unsigned long long)vector.expected);
    }
  std::puts("xxh64: passed");
}
