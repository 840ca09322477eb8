// Looks over a pickle before Python's unpickler, which trusts it, may see it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace realign_fast {

inline constexpr int kMaxPickleDepth = 32;

// Walks the opcodes of one pickle of `size` bytes without running any. Throws std::invalid_argument, which names the
// byte, where the pickle
//   - ends early or goes on after its end,
//   - uses an opcode that plain values and NumPy arrays do not need,
//   - names a length larger than what is left, or a memo index that no pickler would choose (CPython allocates
//     a table up to that index),
//   - nests deeper than kMaxPickleDepth, or changes a container after putting it into another (by which depth could
//     grow unseen): deep values overflow the C stack when they are freed.
void scan_pickle(const std::uint8_t* data, std::size_t size);

}  // namespace realign_fast
