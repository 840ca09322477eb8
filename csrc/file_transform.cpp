#include "file_transform.h"

#include "file_read.h"

namespace realign {
namespace {

// What is read before it is mapped: so much stays in the cache of a core.
constexpr int64_t kPieceBytes = 256 << 10;

}  // namespace

BadRows read_transform(const FileRows& files, const Rows& rows, const RowMap& map, int num_threads,
                       int64_t* first_short) {
  const RowTransformKernel kernel = current_table().row_transform[rows.dtype][rows.dtype];
  const Map view = map.view();
  const MapTable table{&view, nullptr};
  const int64_t row_bytes = rows.range.stride;
  const int64_t piece = std::max<int64_t>(1, kPieceBytes / row_bytes);
  std::atomic<int64_t> first{rows.range.num_rows};
  const auto read = [&](char* data, int64_t begin, int64_t end) {
    if (files.fds) return read_rows(files.fds + begin, files.offsets + begin, end - begin, row_bytes, data, 1);
    return read_file(files.fd, data, (end - begin) * row_bytes, files.offset + begin * row_bytes, 1) / row_bytes;
  };
  const int num_parts = useful_threads(num_threads, rows.range.num_rows, rows.bytes());
  const BadRows bad =
      for_each_range(rows, num_parts, [&](int, const RowRange& range, int64_t start, double* scratch, BadRows* met) {
        for (int64_t done = 0; done < range.num_rows; done += piece) {
          const int64_t count = std::min(piece, range.num_rows - done);
          const RowRange part{range.data + done * row_bytes, row_bytes, count, range.dim};
          char* data = const_cast<char*>(part.data);
          const int64_t num_read = read(data, start + done, start + done + count);
          if (num_read < count) {
            int64_t so_far = first.load();
            while (start + done + num_read < so_far && !first.compare_exchange_weak(so_far, start + done + num_read)) {
            }
            return;
          }
          BadRows of_part;
          kernel(part, table.from(start + done), data, row_bytes, false, scratch, &of_part);
          add_bad_rows(of_part, done, met);
        }
      });
  *first_short = first.load();
  return bad;
}

}  // namespace realign
