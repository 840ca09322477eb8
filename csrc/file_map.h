// Part of a file as memory: read without a copy.
#pragma once

#include <atomic>
#include <cstdint>

namespace realign {

// Bytes [offset, offset + size) of an open file, mapped for reading. Where the file has become shorter meanwhile, or
// the disk fails, zeros are read and `broken` is set: no signal ends the process.
class FileMap {
 public:
  FileMap(int fd, int64_t offset, int64_t size);  // throws std::system_error
  ~FileMap();
  FileMap(const FileMap&) = delete;
  FileMap& operator=(const FileMap&) = delete;

  const char* data() const { return data_; }
  int64_t size() const { return size_; }
  bool broken() const;

 private:
  char* begin_;
  const char* data_;
  int64_t size_, mapped_;
  int slot_;
};

}  // namespace realign
