// Ids of rows: which number a row of that id has. The table lies in a file that is mapped, so nothing in it is trusted.
#pragma once

#include <cstdint>
#include <string_view>

namespace realign {

// Id `i` is text[offsets[i], offsets[i + 1]).
struct Ids {
  const int64_t* offsets;
  const char* text;
  int64_t count, text_size;

  // Empty where the offsets are not those of a part of the text.
  std::string_view at(int64_t row) const {
    const int64_t begin = offsets[row], end = offsets[row + 1];
    if (begin < 0 || begin > end || end > text_size) return {};
    return {text + begin, size_t(end - begin)};
  }
};

uint64_t hash_of(std::string_view id);

// The row with this id, or -1; `hashes` are sorted, `rows` those that they belong to.
int64_t find_id(const Ids& ids, const uint64_t* hashes, const int64_t* rows, std::string_view id);

}  // namespace realign
