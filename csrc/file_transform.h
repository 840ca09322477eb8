// Rows read from files and mapped in one pass over memory: while they are in the cache, or from where they lie.
#pragma once

#include "row_transform.h"

namespace realign {

// Where rows of one dtype lie in files: row `i` at offsets[i] of file fds[i], or, where these are null, all of them in
// `fd` one after the other from `offset` on.
struct FileRows {
  const int32_t* fds;
  const int64_t* offsets;
  int fd;
  int64_t offset;
};

// Fills `rows`, contiguous, and maps them in their place. `first_short` is the first row that its file has not all of,
// or their number. Throws std::system_error.
BadRows read_transform(const FileRows& files, const Rows& rows, const RowMap& map, int num_threads,
                       int64_t* first_short);

}  // namespace realign
