#include "ids.h"

#include <algorithm>

#include "xxh64.h"

namespace realign {

uint64_t hash_of(std::string_view id) {
  Xxh64 hash;
  hash.update(reinterpret_cast<const unsigned char*>(id.data()), id.size());
  return hash.digest();
}

int64_t find_id(const Ids& ids, const uint64_t* hashes, const int64_t* rows, std::string_view id) {
  const uint64_t wanted = hash_of(id);
  // Hashes lie evenly: first where it should be, then so far around that it must be among them.
  int64_t low = int64_t(double(wanted) * 0x1p-64 * double(ids.count)), high = low, step = 64;
  low = high = std::clamp(low, int64_t(0), ids.count);
  while (low > 0 && hashes[low - 1] >= wanted) low = std::max(int64_t(0), low - step), step *= 4;
  for (step = 64; high < ids.count && hashes[high] < wanted; step *= 4) high = std::min(ids.count, high + step);
  for (const uint64_t* at = std::lower_bound(hashes + low, hashes + high, wanted);
       at < hashes + ids.count && *at == wanted; ++at) {
    const int64_t row = rows[at - hashes];
    if (row >= 0 && row < ids.count && ids.at(row) == id) return row;
  }
  return -1;
}

}  // namespace realign
