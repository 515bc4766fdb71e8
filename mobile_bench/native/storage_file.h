// Measures how fast a file is read: blocks at random places, several at a time, from storage and
// never from memory.
#pragma once

#include <cstdint>
#include <string>

namespace stoker {

enum class ReadMode {
  kDirect,    // past the page cache
  kBuffered,  // pread through the page cache, of blocks that are not in it
  kMapped,    // copies from a shared map, of blocks that are not in the page cache
};

struct ReadLoad {
  ReadMode mode = ReadMode::kDirect;
  uint64_t block = 0;      // bytes per read, a multiple of 4096
  int depth = 1;           // concurrent reads: one thread waits for each
  double seconds = 0.1;    // after which no further read begins
  uint64_t seed = 1;       // seed of the places
  bool huge_pages = true;  // reads into huge pages, as the engine does
};

struct ReadSpeed {
  int64_t reads = 0;   // 0: the whole file was in memory
  int64_t bytes = 0;   // reads * block
  double seconds = 0;  // from the common start to the end of the last read
};

// A file to measure with, open as long as the object lives. System failures throw Error(kDevice)
// with the path, what was tried and why it failed; on Windows everything throws.
class StorageFile {
 public:
  // Opens an existing file for reading.
  explicit StorageFile(const std::string& path);
  // Makes an empty file in `folder`. Its name is gone before this returns, so the space is free
  // again when the process ends, however it ends.
  static StorageFile scratch(const std::string& folder);
  ~StorageFile();
  StorageFile(StorageFile&& other) noexcept;
  StorageFile& operator=(StorageFile&&) = delete;

  // Appends pseudo-random bytes to a scratch file, past the page cache if the file system lets it,
  // and waits until they are stored. bytes: a multiple of 4096.
  void append(uint64_t bytes);

  uint64_t nbytes() const { return size_; }
  int descriptor() const { return descriptor_; }
  // False if the file system refuses direct I/O.
  bool direct() const { return direct_; }

  // Reads blocks in a random order, none twice, until the time or the file is over. Blocks that
  // buffered and mapped reads find in memory (read-ahead brings more than was asked for) are left
  // out. Must not be called from two threads at once. Throws Error(kOption) if the load is
  // impossible for this file.
  ReadSpeed read(const ReadLoad& load);

 private:
  StorageFile(const std::string& path, int descriptor);

  std::string path_;  // for messages
  int descriptor_ = -1;
  uint64_t size_ = 0;
  bool direct_ = false;
  uint64_t random_ = 0;  // state of append()
};

}  // namespace stoker
