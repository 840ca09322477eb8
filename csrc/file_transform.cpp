#include "file_transform.h"

#include <sys/stat.h>

#include <cerrno>
#include <system_error>

#include "file_map.h"
#include "file_read.h"

namespace realign {
namespace {

// What is read before it is mapped: so much stays in the cache of a core.
constexpr int64_t kPieceBytes = 256 << 10;
// From so much on it is mapped where it lies, without a copy; for less, to enter its pages costs more than that saves.
constexpr int64_t kWhereItLiesBytes = 4 << 20;

// How many rows of so many bytes a file has from `offset` on.
int64_t rows_in_file(int fd, int64_t offset, int64_t row_bytes) {
  struct stat found;
  if (fstat(fd, &found) != 0) throw std::system_error(errno, std::generic_category());
  return std::max<int64_t>(0, int64_t(found.st_size) - offset) / row_bytes;
}

// Null where the file system can read files, but not as memory.
std::unique_ptr<FileMap> map_if_possible(int fd, int64_t offset, int64_t size) {
  try {
    return std::make_unique<FileMap>(fd, offset, size);
  } catch (const std::system_error& error) {
    if (error.code().value() != ENODEV) throw;
    return nullptr;
  }
}

BadRows transform_where_it_lies(const FileMap& file, int fd, int64_t offset, const Rows& rows, const MapTable& maps,
                                RowTransformKernel kernel, int num_parts, int64_t* first_short) {
  const RowRange& to = rows.range;
  const Rows from{RowRange{file.data(), to.stride, to.num_rows, to.dim}, rows.dtype};
  const BadRows bad =
      for_each_range(from, num_parts, [&](int, const RowRange& range, int64_t first, double* scratch, BadRows* met) {
        kernel(range, maps, const_cast<char*>(to.data) + first * to.stride, to.stride, true, scratch, met);
      });
  // Asked last: what a file loses while it is read is zeros, in its last page even without a word.
  *first_short = std::min(to.num_rows, rows_in_file(fd, offset, to.stride));
  if (file.broken() && *first_short == to.num_rows) throw std::system_error(EIO, std::generic_category());
  return bad;
}

}  // namespace

BadRows read_transform(const FileRows& files, const Rows& rows, const RowMap& map, int num_threads,
                       int64_t* first_short) {
  const RowTransformKernel kernel = current_table().row_transform[rows.dtype][rows.dtype];
  const Map view = map.view();
  const MapTable table{&view, nullptr};
  const int64_t row_bytes = rows.range.stride;
  const int num_parts = useful_threads(num_threads, rows.range.num_rows, rows.bytes());
  if (!files.fds && rows.bytes() >= kWhereItLiesBytes && files.offset % kItemsize[rows.dtype] == 0)
    if (std::shared_ptr<FileMap> file = map_if_possible(files.fd, files.offset, rows.bytes())) {
      const BadRows bad =
          transform_where_it_lies(*file, files.fd, files.offset, rows, table, kernel, num_parts, first_short);
      run_later([file = std::move(file)] {});  // pages take their time, and who asked has other things to do
      return bad;
    }
  const int64_t piece = std::max<int64_t>(1, kPieceBytes / row_bytes);
  std::atomic<int64_t> first{rows.range.num_rows};
  const auto read = [&](char* data, int64_t begin, int64_t end) {
    if (files.fds) return read_rows(files.fds + begin, files.offsets + begin, end - begin, row_bytes, data, 1);
    return read_file(files.fd, data, (end - begin) * row_bytes, files.offset + begin * row_bytes, 1) / row_bytes;
  };
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
