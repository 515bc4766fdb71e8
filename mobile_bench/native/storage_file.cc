#include "mobile_bench/native/storage_file.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#define STOKER_POSIX 1
#endif

#include "offload/io/files.h"
#include "runtime/base/errors.h"
#include "runtime/base/memory.h"
#include "runtime/base/start_threads.h"

namespace stoker {

#if STOKER_POSIX

namespace {

using Clock = std::chrono::steady_clock;

constexpr uint64_t kPage = 4096;  // direct I/O wants multiples of this
constexpr uint64_t kHugePage = uint64_t{2} << 20;
constexpr uint64_t kWrite = uint64_t{4} << 20;
constexpr int kMaxDepth = 256;
constexpr uint64_t kMaxMemory = uint64_t{1} << 30;  // bound of depth * block

[[noreturn]] void fail(const std::string& path, const std::string& what, int error) {
  throw Error(ErrorKind::kDevice, path + ": " + what + ": " + std::strerror(error));
}

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorKind::kOption, message); }

struct AlignedDelete {
  void operator()(uint8_t* p) const { ::operator delete(p, std::align_val_t(kPage)); }
};
using AlignedBytes = std::unique_ptr<uint8_t, AlignedDelete>;

AlignedBytes aligned_bytes(uint64_t n) {
  return AlignedBytes(static_cast<uint8_t*>(::operator new(n, std::align_val_t(kPage))));
}

// Drops the file's pages from the page cache, except those that are dirty or in use.
void drop_cache(int descriptor) {
#if defined(POSIX_FADV_DONTNEED)
  ::posix_fadvise(descriptor, 0, 0, POSIX_FADV_DONTNEED);
#else
  (void)descriptor;
#endif
}

// A mapping of the whole file, which also tells which of its pages are in memory.
class Map {
 public:
  Map(const std::string& path, int descriptor, uint64_t bytes) : bytes_(bytes) {
    int own = -1;
#if defined(__linux__)
    // The kernel stops reading ahead around faults once an open file has had many for which it did
    // not help. The file is opened anew, so that no measurement depends on those before it.
    own = ::open(("/proc/self/fd/" + std::to_string(descriptor)).c_str(), O_RDONLY | O_CLOEXEC);
#endif
    void* base = ::mmap(nullptr, bytes, PROT_READ, MAP_SHARED, own < 0 ? descriptor : own, 0);
    const int error = errno;
    if (own >= 0) ::close(own);  // the mapping keeps the file open
    if (base == MAP_FAILED) fail(path, "mmap", error);
    base_ = static_cast<uint8_t*>(base);
  }
  ~Map() { ::munmap(base_, bytes_); }
  Map(const Map&) = delete;
  Map& operator=(const Map&) = delete;

  const uint8_t* at(uint64_t offset) const { return base_ + offset; }

  // Whether any page of [offset, offset + bytes) is in the page cache. pages: scratch.
  bool cached(uint64_t offset, uint64_t bytes, std::vector<unsigned char>& pages) const {
    static const uint64_t page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
    const uint64_t begin = offset / page * page;
    pages.resize((offset + bytes - begin + page - 1) / page);
#if defined(__APPLE__)
    char* into = reinterpret_cast<char*>(pages.data());
#else
    unsigned char* into = pages.data();
#endif
    if (::mincore(base_ + begin, offset + bytes - begin, into) != 0) return false;
    return std::any_of(pages.begin(), pages.end(), [](unsigned char p) { return (p & 1) != 0; });
  }

 private:
  uint8_t* base_ = nullptr;
  const uint64_t bytes_;
};

// Reads all of [offset, offset + bytes); returns 0 or an errno.
int read_block(int descriptor, uint8_t* into, uint64_t offset, uint64_t bytes) {
  uint64_t got = 0;
  while (got < bytes) {
    const ssize_t n =
        ::pread(descriptor, into + got, bytes - got, static_cast<off_t>(offset + got));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return errno;
    if (n == 0) return EIO;  // the file has become shorter
    got += static_cast<uint64_t>(n);
  }
  return 0;
}

// A start signal that many threads wait for without using the CPUs.
class Gate {
 public:
  void open() {
    const std::lock_guard<std::mutex> lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return open_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = false;
};

}  // namespace

StorageFile::StorageFile(const std::string& path)
    : StorageFile(path, ::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
  struct stat s;
  const bool known = ::fstat(descriptor_, &s) == 0;
  if (!known || !S_ISREG(s.st_mode)) {
    const int error = known ? EINVAL : errno;
    fail(path, "expected a regular file", error);
  }
  size_ = static_cast<uint64_t>(s.st_size);
}

StorageFile::StorageFile(const std::string& path, int descriptor)
    : path_(path), descriptor_(descriptor) {
  if (descriptor_ < 0) fail(path_, "cannot open", errno);
  direct_ = set_direct(descriptor_, true);
  set_direct(descriptor_, false);
}

StorageFile StorageFile::scratch(const std::string& folder) {
  std::string name = folder + "/.stoker-probe-XXXXXX";
  const int descriptor = ::mkstemp(name.data());
  if (descriptor < 0) fail(folder, "cannot make a scratch file", errno);
  ::fcntl(descriptor, F_SETFD, FD_CLOEXEC);
  if (::unlink(name.c_str()) != 0) {
    const int error = errno;
    ::close(descriptor);
    fail(name, "cannot remove the scratch file", error);
  }
  return StorageFile(folder + "/scratch file", descriptor);
}

StorageFile::StorageFile(StorageFile&& other) noexcept
    : path_(std::move(other.path_)),
      descriptor_(std::exchange(other.descriptor_, -1)),
      size_(other.size_),
      direct_(other.direct_),
      random_(other.random_) {}

StorageFile::~StorageFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

void StorageFile::append(uint64_t bytes) {
  if (bytes == 0 || bytes % kPage != 0) {
    refuse("scratch file: expected a multiple of 4096 bytes, found " + std::to_string(bytes));
  }
  const AlignedBytes piece = aligned_bytes(std::min(bytes, kWrite));
  const uint64_t end = size_ + bytes;
  bool direct = direct_ && set_direct(descriptor_, true);
  int error = 0;
  while (size_ < end && error == 0) {
    const uint64_t n = std::min(end - size_, kWrite);
    // The data differ everywhere, so that no layer below can compress or deduplicate them.
    for (uint64_t i = 0; i < n; i += 8) {
      random_ += 0x9e3779b97f4a7c15;
      uint64_t x = (random_ ^ (random_ >> 30)) * 0xbf58476d1ce4e5b9;
      x ^= x >> 27;
      std::memcpy(piece.get() + i, &x, 8);
    }
    uint64_t done = 0;
    while (done < n && error == 0) {
      const ssize_t put =
          ::pwrite(descriptor_, piece.get() + done, n - done, static_cast<off_t>(size_ + done));
      if (put > 0) {
        done += static_cast<uint64_t>(put) / kPage * kPage;
        if (static_cast<uint64_t>(put) < kPage) error = ENOSPC;
      } else if (put == 0 || errno != EINTR) {
        error = put == 0 ? ENOSPC : errno;
        if (error == EINVAL && direct) {  // the file system accepted the flag, but not the write
          direct = direct_ = false;
          set_direct(descriptor_, false);
          error = 0;
        }
      }
    }
    size_ += done;
  }
  set_direct(descriptor_, false);
  if (error == 0 && ::fsync(descriptor_) != 0) error = errno;
  drop_cache(descriptor_);
  if (error != 0) fail(path_, "cannot write", error);
}

ReadSpeed StorageFile::read(const ReadLoad& load) {
  const uint64_t block = load.block;
  if (block == 0 || block % kPage != 0 || block > size_) {
    refuse("storage: expected a block that is a multiple of 4096 and at most the file's " +
           std::to_string(size_) + " bytes, found " + std::to_string(block));
  }
  if (load.depth < 1 || load.depth > kMaxDepth || block > kMaxMemory / uint64_t(load.depth)) {
    refuse("storage: expected a depth of 1 to 256 and at most 1 GiB under way, found " +
           std::to_string(load.depth) + " reads of " + std::to_string(block) + " bytes");
  }
  const uint64_t places = size_ / block;
  if (places > std::numeric_limits<uint32_t>::max()) refuse("storage: too large a file");
  std::vector<uint32_t> order(places);
  for (uint64_t i = 0; i < places; ++i) order[i] = static_cast<uint32_t>(i);
  std::shuffle(order.begin(), order.end(), std::mt19937_64(load.seed));

  const bool direct = load.mode == ReadMode::kDirect;
  if (direct && !(direct_ && set_direct(descriptor_, true))) {
    fail(path_, "the file system refuses direct I/O", EINVAL);
  }
  drop_cache(descriptor_);
  const std::unique_ptr<Map> map =
      direct ? nullptr : std::make_unique<Map>(path_, descriptor_, size_);

  struct Reader {
    uint8_t* into = nullptr;  // [block]
    int64_t reads = 0;
    Clock::time_point end;
  };
  std::vector<Reader> readers(static_cast<size_t>(load.depth));
  // The buffers are in huge pages, as the engine's are: direct reads into scattered small pages are
  // up to 2.5 times slower on some virtual disks. They are touched now, so that no page faults are
  // timed.
  const uint64_t bytes = (block * readers.size() + kHugePage - 1) / kHugePage * kHugePage;
  const HugeMemory huge(load.huge_pages ? bytes : 0, "blocks to read into");
  const AlignedBytes small = load.huge_pages ? nullptr : aligned_bytes(bytes);
  uint8_t* const memory = load.huge_pages ? huge.data() : small.get();
  std::memset(memory, 1, bytes);
  for (size_t i = 0; i < readers.size(); ++i) readers[i].into = memory + i * block;
  Gate gate;
  Clock::time_point begin, deadline;
  std::atomic<uint64_t> next{0};
  std::atomic<int> error{0};
  const auto work = [&](Reader& r) {
    std::vector<unsigned char> pages;
    gate.wait();
    r.end = begin;
    while (r.end < deadline && error.load(std::memory_order_relaxed) == 0) {
      const uint64_t i = next.fetch_add(1, std::memory_order_relaxed);
      if (i >= places) break;
      const uint64_t offset = order[i] * block;
      if (map && map->cached(offset, block, pages)) continue;
      if (load.mode == ReadMode::kMapped) {
        std::memcpy(r.into, map->at(offset), block);
      } else if (const int e = read_block(descriptor_, r.into, offset, block); e != 0) {
        error.store(e, std::memory_order_relaxed);
        break;
      }
      ++r.reads;
      r.end = Clock::now();
    }
  };
  std::vector<std::thread> threads =
      start_threads(load.depth, [&](int i) { work(readers[static_cast<size_t>(i)]); });
  // With fewer threads the reported depth would be wrong.
  const int refused = static_cast<int>(threads.size()) < load.depth ? EAGAIN : 0;
  begin = Clock::now();
  deadline =
      refused ? begin
              : begin + std::chrono::duration_cast<Clock::duration>(
                            std::chrono::duration<double>(std::clamp(load.seconds, 0.0, 3600.0)));
  gate.open();
  join(threads);
  set_direct(descriptor_, false);
  if (refused != 0) fail(path_, "cannot start " + std::to_string(load.depth) + " threads", refused);
  if (error.load() != 0) fail(path_, "cannot read", error.load());

  ReadSpeed speed;
  Clock::time_point end = begin;
  for (const Reader& r : readers) {
    speed.reads += r.reads;
    if (r.reads > 0) end = std::max(end, r.end);
  }
  speed.bytes = speed.reads * static_cast<int64_t>(block);
  speed.seconds = std::chrono::duration<double>(end - begin).count();
  return speed;
}

#else

namespace {

[[noreturn]] void refuse_here() {
  throw Error(ErrorKind::kDevice, "storage: cannot be measured on this system, which has no pread");
}

}  // namespace

StorageFile::StorageFile(const std::string&) { refuse_here(); }
StorageFile::StorageFile(const std::string&, int) { refuse_here(); }
StorageFile StorageFile::scratch(const std::string&) { refuse_here(); }
StorageFile::~StorageFile() = default;
StorageFile::StorageFile(StorageFile&&) noexcept = default;
void StorageFile::append(uint64_t) { refuse_here(); }
ReadSpeed StorageFile::read(const ReadLoad&) { refuse_here(); }

#endif

}  // namespace stoker
