// IoFiles are the files that a backend reads: they are opened once, checked, and read directly
// where the file system supports that.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "offload/io/io.h"

namespace stoker {

// The outcome of one read.
struct ReadOutcome {
  std::string error;  // empty where `needed` bytes arrived
  int64_t calls = 0;  // completed system calls
  int64_t bytes = 0;  // bytes that arrived
};

enum class FileAccess {
  kDirect,    // past the page cache; kBuffered where the file system refuses that
  kBuffered,  // through the page cache, from which what was read is dropped again
  kCached,    // through the page cache
};

// Sets or clears direct I/O on an open file; returns false where that is refused. Not on Windows.
bool set_direct(int descriptor, bool on);

// IoFiles is immutable after the constructor: any number of threads may read at once.
class IoFiles {
 public:
  // Throws Error(kModelFile) where a file cannot be opened, is not a regular one or does not have
  // sizes[i] bytes, Error(kUnsupported) on Windows.
  IoFiles(const std::vector<std::string>& paths, const std::vector<uint64_t>& sizes,
          FileAccess access);
  ~IoFiles();
  IoFiles(const IoFiles&) = delete;
  IoFiles& operator=(const IoFiles&) = delete;

  int size() const { return static_cast<int>(files_.size()); }
  int descriptor(int32_t file) const { return at(file).descriptor; }
  const std::string& path(int32_t file) const { return at(file).path; }
  uint64_t nbytes(int32_t file) const { return at(file).size; }

  // Throws std::invalid_argument where `read` does not lie in these files (a mistake of the
  // caller).
  void check(const Read& read) const;

  // Blocks until `needed` bytes have arrived; it continues after interruptions and short reads.
  ReadOutcome read(const Read& read) const;
  // True where this system has read_merged().
#if defined(__APPLE__)
  static constexpr bool kMerges = false;  // preadv is missing before macOS 11
#else
  static constexpr bool kMerges = true;
#endif
  // Makes one system call for several reads, each of which begins where the one before ends or at
  // its last page. Returns false, with the memory in an undefined state, where that did not bring
  // all bytes: read() then tells which read failed and why.
  bool read_merged(const Read* const* reads, int n, ReadOutcome* outcome) const;

  // Continues read(): `got` bytes of it have arrived and the last call returned `found` more (or
  // -errno) from resume(got) on. Returns true where another call is to follow; otherwise the read
  // has ended and outcome->error says how.
  bool advance(const Read& read, int64_t found, uint64_t* got, ReadOutcome* outcome) const;
  // Returns where to continue after `got` bytes: direct reads start at a multiple of kIoAlign.
  static uint64_t resume(uint64_t got) { return got / kIoAlign * kIoAlign; }

  // Drops what was read from the page cache, which counts against the memory limit of a control
  // group. Only for kBuffered files.
  void drop_cache(int32_t file, uint64_t offset, uint64_t bytes) const;

  // Returns "" while the file is the one that was opened, else a message. Costs one fstat.
  std::string changed(int32_t file) const;
  // Returns the message of a read that found `found` bytes instead of those needed.
  std::string failure(const Read& read, uint64_t found, const std::string& why) const;

  // Returns "direct", "buffered: why" or "page cache", for people.
  std::string mode() const;

 private:
  struct File {
    std::string path;
    int descriptor = -1;
    uint64_t size = 0;
    int64_t modified_ns = 0;
    FileAccess access = FileAccess::kDirect;
    std::string why;  // why it is kBuffered
  };

  const File& at(int32_t file) const { return files_[static_cast<size_t>(file)]; }
  void open(File& file, FileAccess access);
  void close_all();

  std::vector<File> files_;
};

}  // namespace stoker
