// Reading part of a file with several threads: from the page cache one thread copies slower than memory can.
#pragma once

#include <cstdint>

namespace realign {

// Fills `data` from `offset` on and returns how many bytes the file had there, less than `size` only at its end.
// Throws std::system_error.
int64_t read_file(int fd, char* data, int64_t size, int64_t offset, int num_threads);

// Copies row `i`, `row_bytes` from offsets[i] of file fds[i] on, to data + i * row_bytes; returns the first row that
// its file has not all of, `num_rows` where there is none. Throws std::system_error.
int64_t read_rows(const int32_t* fds, const int64_t* offsets, int64_t num_rows, int64_t row_bytes, char* data,
                  int num_threads);

}  // namespace realign
