// What the tests of the I/O layer share: files of known bytes, jobs with their memory, a listener
// that can hold an I/O thread, so that an order can be tested without a clock.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "offload/io/io.h"
#include "runtime/base/errors.h"

namespace io_fixture {

using stoker::IoBackend;
using stoker::IoJob;
using stoker::IoOptions;
using stoker::IoStatus;
using stoker::kIoAlign;

inline int failures = 0;

inline void check(bool condition, const std::string& what) {
  if (condition) return;
  ++failures;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// A file whose byte at each position is known.
class TestFile {
 public:
  TestFile(const std::string& name, uint64_t size, uint64_t salt)
      : path_(folder() + "/" + name), size_(size), salt_(salt) {
    write(path_, 0);
  }
  ~TestFile() { std::filesystem::remove(path_); }

  const std::string& path() const { return path_; }
  uint64_t size() const { return size_; }
  uint8_t byte(uint64_t position) const {
    return static_cast<uint8_t>(((position + salt_) * 0x9e3779b97f4a7c15) >> 56);
  }
  bool same(const uint8_t* bytes, uint64_t offset, uint64_t n) const {
    for (uint64_t i = 0; i < n; ++i) {
      if (bytes[i] != byte(offset + i)) return false;
    }
    return true;
  }
  // The file's bytes with `flip` added to each, at any path.
  void write(const std::string& path, uint8_t flip) const {
    std::vector<uint8_t> bytes(size_);
    for (uint64_t i = 0; i < size_; ++i) bytes[i] = static_cast<uint8_t>(byte(i) + flip);
    const int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    uint64_t done = 0;
    while (fd >= 0 && done < size_) {
      const ssize_t n = ::write(fd, bytes.data() + done, size_ - done);
      if (n <= 0) break;
      done += static_cast<uint64_t>(n);
    }
    if (fd >= 0) ::fsync(fd);  // dirty pages would stay in the page cache
    if (fd >= 0) ::close(fd);
    if (done != size_) {
      std::fprintf(stderr, "cannot write %s\n", path.c_str());
      std::exit(2);
    }
  }
  // Sure to differ from the time of opening, also where the clock of the file system is coarse.
  void set_modified(time_t seconds) const {
    const struct timespec times[2] = {{seconds, 0}, {seconds, 0}};
    ::utimensat(AT_FDCWD, path_.c_str(), times, 0);
  }

  static const std::string& folder() {
    static const std::string made = [] {
      std::string name = std::filesystem::temp_directory_path().string() + "/io_test_XXXXXX";
      if (!::mkdtemp(name.data())) std::exit(2);
      return name;
    }();
    return made;
  }

 private:
  const std::string path_;
  const uint64_t size_;
  const uint64_t salt_;
};

// Memory of one job's reads, and the job.
class Slot {
 public:
  explicit Slot(uint64_t bytes = 64 * 1024) : bytes_(bytes) {
    for (auto& m : memory_) {
      m = static_cast<uint8_t*>(::operator new(bytes, std::align_val_t(kIoAlign)));
    }
  }
  ~Slot() {
    for (auto& m : memory_) ::operator delete(m, std::align_val_t(kIoAlign));
  }
  Slot(const Slot&) = delete;
  Slot& operator=(const Slot&) = delete;

  void clear() { job.n_reads = 0; }
  // The pages around [begin, begin + n) of a file, n > 0, where the file has those n bytes.
  void add(int32_t file, uint64_t begin, uint64_t n) {
    const size_t i = static_cast<size_t>(job.n_reads++);
    stoker::Read& r = job.reads[i];
    r.file = file;
    r.offset = begin / kIoAlign * kIoAlign;
    r.needed = begin + n - r.offset;
    r.bytes = (r.needed + kIoAlign - 1) / kIoAlign * kIoAlign;
    r.into = memory_[i];
    if (r.bytes > bytes_) std::exit(3);
    std::memset(r.into, 0xa5, r.bytes);
  }
  void wait() const {
    while (job.status.load(std::memory_order_acquire) == IoStatus::kPending) {
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
  }
  IoStatus status() const { return job.status.load(std::memory_order_acquire); }
  template <typename Files>
  bool same(const Files& files) const {
    for (int i = 0; i < job.n_reads; ++i) {
      const stoker::Read& r = job.reads[static_cast<size_t>(i)];
      if (!files[static_cast<size_t>(r.file)]->same(r.into, r.offset, r.needed)) return false;
    }
    return true;
  }

  IoJob job;

 private:
  const uint64_t bytes_;
  uint8_t* memory_[IoJob::kMaxReads];
};

using Files = std::vector<std::unique_ptr<TestFile>>;

inline std::unique_ptr<IoBackend> open(const Files& files, const std::string& backend, int readers,
                                       bool direct = true, stoker::IoListener* listener = nullptr) {
  std::vector<std::string> paths;
  std::vector<uint64_t> sizes;
  for (const auto& f : files) {
    paths.push_back(f->path());
    sizes.push_back(f->size());
  }
  IoOptions options;
  options.backend = backend;
  options.readers = readers;
  options.direct = direct;
  return open_io(paths, sizes, options, listener);
}

// Notes the order in which jobs end, and holds the I/O thread at the end of job `gate`.
class Order final : public stoker::IoListener {
 public:
  explicit Order(uint64_t gate = UINT64_MAX) : gate_(gate) {}
  void on_job_end(IoJob& job) override {
    std::unique_lock<std::mutex> lock(mutex_);
    tags_.push_back(job.tag);
    changed_.notify_all();
    if (job.tag == gate_) changed_.wait(lock, [this] { return open_; });
  }
  void wait_ends(size_t n) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return tags_.size() >= n; });
  }
  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }
  std::vector<uint64_t> tags() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return tags_;
  }

 private:
  const uint64_t gate_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<uint64_t> tags_;
  bool open_ = false;
};

// A backend with one reader, held at the end of job 0.
struct Held {
  Held(const Files& files, const std::string& backend)
      : order(0), io(open(files, backend, 1, true, &order)) {
    first.add(0, 0, 100);
    io->submit(first.job, true);
    order.wait_ends(1);
  }
  Slot first;
  Order order;
  std::unique_ptr<IoBackend> io;
};

template <typename Body>
std::string error_of(stoker::ErrorKind kind, Body body) {
  try {
    body();
  } catch (const stoker::Error& e) {
    check(e.kind() == kind, std::string("the error's kind: ") + e.what());
    check(!contains(e.what(), "\n"), std::string("one line: ") + e.what());
    return e.what();
  }
  return "";
}

inline bool uring_works(const Files& files) {
  try {
    open(files, "uring", 4);
    return true;
  } catch (const stoker::Error& e) {
    check(e.kind() == stoker::ErrorKind::kOption && contains(e.what(), "uring"),
          std::string("uring is refused with a reason: ") + e.what());
    std::printf("uring is not tested: %s\n", e.what());
    return false;
  }
}

// Sizes that are and are not multiples of a page.
inline Files three_files() {
  Files files;
  files.push_back(std::make_unique<TestFile>("first", (3 << 20) + 777, 1));
  files.push_back(std::make_unique<TestFile>("second", 163840, 2));
  files.push_back(std::make_unique<TestFile>("third", 12289, 3));
  return files;
}

// Every backend that can be used here.
inline std::vector<std::string> usable_backends(const Files& files) {
  std::vector<std::string> backends = {"pread_pool", "mmap", "null"};
  if (uring_works(files)) backends.push_back("uring");
  return backends;
}

inline int report(const char* program) {
  std::filesystem::remove(TestFile::folder());
  std::printf("%s: %d failures\n", program, failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace io_fixture
