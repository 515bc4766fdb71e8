#include "offload/io/files.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/vfs.h>
#endif
#define STOKER_POSIX 1
#endif

#include "runtime/base/errors.h"

#if STOKER_POSIX

namespace stoker {

bool set_direct(int descriptor, bool on) {
#if defined(__APPLE__)
  return ::fcntl(descriptor, F_NOCACHE, on ? 1 : 0) == 0;
#elif defined(O_DIRECT)
  const int flags = ::fcntl(descriptor, F_GETFL);
  return flags >= 0 && ::fcntl(descriptor, F_SETFL, on ? flags | O_DIRECT : flags & ~O_DIRECT) == 0;
#else
  (void)descriptor;
  return !on;
#endif
}

namespace {

static_assert(sizeof(off_t) >= 8, "files of more than 2 GB");

constexpr uint64_t kVerifyBytes = 64 * 1024;
constexpr int kMaxMerged = 32;
constexpr const char* kRefuses = "refuses direct I/O";

[[noreturn]] void fail(const std::string& path, const std::string& what) {
  throw Error(ErrorKind::kModelFile, path + ": " + what);
}

int64_t modified_ns(const struct stat& s) {
#if defined(__APPLE__)
  return int64_t{s.st_mtimespec.tv_sec} * 1000000000 + s.st_mtimespec.tv_nsec;
#else
  return int64_t{s.st_mtim.tv_sec} * 1000000000 + s.st_mtim.tv_nsec;
#endif
}

struct AlignedDelete {
  void operator()(uint8_t* p) const { ::operator delete(p, std::align_val_t(kIoAlign)); }
};
using AlignedBytes = std::unique_ptr<uint8_t, AlignedDelete>;

AlignedBytes aligned_bytes(uint64_t n) {
  return AlignedBytes(static_cast<uint8_t*>(::operator new(n, std::align_val_t(kIoAlign))));
}

// Returns the file system's name, for messages, where the kernel's number for it is known.
std::string file_system(int descriptor) {
#if defined(__linux__)
  struct statfs s;
  if (::fstatfs(descriptor, &s) != 0) return "unknown file system";
  switch (static_cast<uint32_t>(s.f_type)) {  // <linux/magic.h>
    case 0x01021994:
      return "tmpfs";
    case 0x65735546:
      return "FUSE";
    case 0x794c7630:
      return "overlayfs";
    case 0x6969:
      return "NFS";
    case 0x01021997:
      return "9P";
    case 0x2fc12fc1:
      return "ZFS";
    case 0x9123683e:
      return "btrfs";
    case 0xf2f52010:
      return "F2FS";
    default: {
      char text[32];
      std::snprintf(text, sizeof text, "file system 0x%x", static_cast<unsigned>(s.f_type));
      return text;
    }
  }
#else
  (void)descriptor;
  return "this file system";
#endif
}

void drop(int descriptor, uint64_t offset, uint64_t bytes) {
#if defined(POSIX_FADV_DONTNEED)
  ::posix_fadvise(descriptor, static_cast<off_t>(offset), static_cast<off_t>(bytes),
                  POSIX_FADV_DONTNEED);
#else
  (void)descriptor, (void)offset, (void)bytes;
#endif
}

// Returns how many bytes of [offset, offset + bytes) arrived, fewer only at the end of the file, or
// -errno.
int64_t read_some(int descriptor, uint8_t* into, uint64_t offset, uint64_t bytes) {
  for (;;) {
    const ssize_t n = ::pread(descriptor, into, bytes, static_cast<off_t>(offset));
    if (n >= 0) return n;
    if (errno != EINTR) return -errno;
  }
}

// Returns "" where direct reads bring the same bytes as buffered ones: some FUSE file systems
// accept direct I/O and return stale bytes, and some drop the last, partial page. Compares the
// file's start and its end.
std::string direct_fault(int descriptor, uint64_t size) {
  const AlignedBytes direct = aligned_bytes(kVerifyBytes), buffered = aligned_bytes(kVerifyBytes);
  const uint64_t last = size > kVerifyBytes ? (size - 1) / kIoAlign * kIoAlign : 0;
  for (const uint64_t offset : {uint64_t{0}, last}) {
    const uint64_t want = std::min(size - offset, kVerifyBytes);
    const uint64_t ask = (want + kIoAlign - 1) / kIoAlign * kIoAlign;
    if (!set_direct(descriptor, true)) return kRefuses;
    const int64_t a = read_some(descriptor, direct.get(), offset, ask);
    set_direct(descriptor, false);
    if (a < 0) return kRefuses;
    const int64_t b = read_some(descriptor, buffered.get(), offset, ask);
    drop(descriptor, offset, ask);
    if (a != b || static_cast<uint64_t>(a) != want ||
        std::memcmp(direct.get(), buffered.get(), want) != 0) {
      return "returns other bytes with direct I/O";
    }
    if (last == 0) break;
  }
  return "";
}

}  // namespace

IoFiles::IoFiles(const std::vector<std::string>& paths, const std::vector<uint64_t>& sizes,
                 FileAccess access) {
  if (paths.size() != sizes.size()) throw std::invalid_argument("IoFiles: one size a path");
  files_.resize(paths.size());
  try {
    for (size_t i = 0; i < paths.size(); ++i) {
      files_[i].path = paths[i];
      files_[i].size = sizes[i];
      open(files_[i], access);
    }
  } catch (...) {
    close_all();
    throw;
  }
}

IoFiles::~IoFiles() { close_all(); }

void IoFiles::close_all() {
  for (File& f : files_) {
    if (f.descriptor >= 0) ::close(f.descriptor);
    f.descriptor = -1;
  }
}

void IoFiles::open(File& f, FileAccess access) {
  // The file is opened without O_DIRECT, which is switched on after the comparison: with one
  // descriptor both kinds of read see the same file even if the path is replaced meanwhile.
  f.descriptor = ::open(f.path.c_str(), O_RDONLY | O_CLOEXEC);
  if (f.descriptor < 0) fail(f.path, std::string("cannot open: ") + std::strerror(errno));
  struct stat s;
  if (::fstat(f.descriptor, &s) != 0) fail(f.path, std::string("fstat: ") + std::strerror(errno));
  if (!S_ISREG(s.st_mode)) fail(f.path, "expected a regular file, found another kind");
  if (static_cast<uint64_t>(s.st_size) != f.size) {
    fail(f.path,
         "expected " + std::to_string(f.size) + " bytes, found " + std::to_string(s.st_size));
  }
  f.modified_ns = modified_ns(s);
  f.access = access;
#if defined(POSIX_FADV_RANDOM)
  // Read-ahead would bring pages that nobody asked for and that drop_cache() does not know of.
  if (access != FileAccess::kCached) ::posix_fadvise(f.descriptor, 0, 0, POSIX_FADV_RANDOM);
#endif
  if (access == FileAccess::kBuffered) f.why = "as asked";
  if (access == FileAccess::kDirect && f.size > 0) {
    std::string fault = direct_fault(f.descriptor, f.size);
    if (fault.empty() && !set_direct(f.descriptor, true)) fault = kRefuses;
    if (!fault.empty()) {
      f.access = FileAccess::kBuffered;
      f.why = "the file system " + fault + " (" + file_system(f.descriptor) + ")";
    }
  }
}

void IoFiles::check(const Read& r) const {
  if (r.file < 0 || r.file >= size() || r.offset % kIoAlign != 0 || r.bytes % kIoAlign != 0 ||
      r.bytes == 0 || r.needed > r.bytes || r.into == nullptr ||
      reinterpret_cast<uintptr_t>(r.into) % kIoAlign != 0) {
    throw std::invalid_argument("Read: file " + std::to_string(r.file) + ", offset " +
                                std::to_string(r.offset) + ", " + std::to_string(r.bytes) +
                                " bytes: expected a known file and multiples of " +
                                std::to_string(kIoAlign));
  }
}

bool IoFiles::advance(const Read& r, int64_t found, uint64_t* got, ReadOutcome* outcome) const {
  if (found == -EINTR || found == -EAGAIN) return true;
  if (found < 0) {
    outcome->error = failure(r, *got, std::strerror(static_cast<int>(-found)));
    return false;
  }
  const uint64_t reached = resume(*got) + static_cast<uint64_t>(found);
  ++outcome->calls;
  if (reached > *got) outcome->bytes += static_cast<int64_t>(reached - *got);
  if (reached >= r.needed) {
    *got = reached;
    return false;
  }
  // A read without progress has met the end of the file.
  if (reached <= *got) {
    outcome->error = failure(r, *got, "");
    return false;
  }
  *got = reached;
  return true;
}

ReadOutcome IoFiles::read(const Read& r) const {
  const File& f = at(r.file);
  ReadOutcome outcome;
  uint64_t got = 0;
  for (;;) {
    const uint64_t from = resume(got);
    const int64_t n = read_some(f.descriptor, r.into + from, r.offset + from, r.bytes - from);
    if (!advance(r, n, &got, &outcome)) break;
  }
  drop_cache(r.file, r.offset, r.bytes);
  return outcome;
}

bool IoFiles::read_merged(const Read* const* reads, int n, ReadOutcome* outcome) const {
  struct iovec parts[kMaxMerged];
  if (n > kMaxMerged) return false;
  const uint64_t begin = reads[0]->offset;
  uint64_t end = begin;
  for (int i = 0; i < n; ++i) {
    const Read& r = *reads[i];
    const uint64_t shared = end - r.offset;  // 0 or one page, which the previous read brings
    parts[i].iov_base = r.into + shared;
    parts[i].iov_len = r.bytes - shared;
    end = r.offset + r.bytes;
  }
  const Read& last = *reads[n - 1];
  const File& f = at(last.file);
#if defined(__APPLE__)
  const ssize_t got = -1;
  (void)parts;
#else
  const ssize_t got = ::preadv(f.descriptor, parts, n, static_cast<off_t>(begin));
#endif
  drop_cache(last.file, begin, end - begin);
  if (got < 0 || begin + static_cast<uint64_t>(got) < last.offset + last.needed) return false;
  outcome->calls = 1;
  outcome->bytes = got;
  for (int i = 1; i < n; ++i) {
    const Read& before = *reads[i - 1];
    const uint64_t shared = before.offset + before.bytes - reads[i]->offset;
    if (shared > 0) std::memcpy(reads[i]->into, before.into + before.bytes - shared, shared);
  }
  return true;
}

void IoFiles::drop_cache(int32_t file, uint64_t offset, uint64_t bytes) const {
  const File& f = at(file);
  if (f.access == FileAccess::kBuffered) drop(f.descriptor, offset, bytes);
}

std::string IoFiles::changed(int32_t file) const {
  const File& f = at(file);
  struct stat s;
  if (::fstat(f.descriptor, &s) != 0) {
    return f.path + ": fstat: " + std::strerror(errno);
  }
  if (static_cast<uint64_t>(s.st_size) != f.size) {
    return f.path + ": changed while the model runs: expected " + std::to_string(f.size) +
           " bytes, found " + std::to_string(s.st_size);
  }
  if (modified_ns(s) != f.modified_ns) {
    return f.path + ": changed while the model runs: expected the file as it was opened, found " +
           "one written since";
  }
  return "";
}

std::string IoFiles::failure(const Read& r, uint64_t found, const std::string& why) const {
  std::string text = path(r.file) + ": offset " + std::to_string(r.offset) + ": expected " +
                     std::to_string(r.needed) + " bytes, found " + std::to_string(found);
  if (!why.empty()) text += ": " + why;
  struct stat s;
  if (::fstat(at(r.file).descriptor, &s) == 0 &&
      (static_cast<uint64_t>(s.st_size) != at(r.file).size ||
       modified_ns(s) != at(r.file).modified_ns)) {
    text += ": the file changed while the model runs (" + std::to_string(at(r.file).size) +
            " bytes when it was opened, " + std::to_string(s.st_size) + " now)";
  }
  return text;
}

std::string IoFiles::mode() const {
  for (const File& f : files_) {
    if (f.access == FileAccess::kBuffered) return "buffered: " + f.why;
    if (f.access == FileAccess::kCached) return "page cache";
  }
  return "direct";
}

}  // namespace stoker

#else

namespace stoker {

// Nothing after the constructor is reached.
IoFiles::IoFiles(const std::vector<std::string>&, const std::vector<uint64_t>&, FileAccess) {
  throw Error(ErrorKind::kUnsupported,
              "offloading: expected Linux, Android or macOS, found a system without pread");
}
IoFiles::~IoFiles() = default;
void IoFiles::check(const Read&) const {}
ReadOutcome IoFiles::read(const Read&) const { return {}; }
bool IoFiles::read_merged(const Read* const*, int, ReadOutcome*) const { return false; }
bool IoFiles::advance(const Read&, int64_t, uint64_t*, ReadOutcome*) const { return false; }
void IoFiles::drop_cache(int32_t, uint64_t, uint64_t) const {}
std::string IoFiles::changed(int32_t) const { return ""; }
std::string IoFiles::failure(const Read&, uint64_t, const std::string&) const { return ""; }
std::string IoFiles::mode() const { return ""; }

}  // namespace stoker

#endif  // STOKER_POSIX
