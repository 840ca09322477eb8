// Reading part of a file with several threads: from the page cache one thread copies slower than memory can.
#pragma once

#include <cstdint>

namespace realign {

// Fills `data` from `offset` on and returns how many bytes the file had there, less than `size` only at its end.
// Throws std::system_error.
int64_t read_file(int fd, char* data, int64_t size, int64_t offset, int num_threads);

}  // namespace realign
