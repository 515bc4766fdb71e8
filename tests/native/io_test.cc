// The I/O layer of offloading: exact bytes on every backend, order, promotion, cancellation, joined
// reads, faults, and files that change. Where an order matters, the only reader is held inside the
// listener, so that nothing here depends on how long a read takes.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "offload/io/files.h"
#include "offload/io/io.h"
#include "offload/io/measure.h"
#include "runtime/core/errors.h"

namespace {

using stoker::IoBackend;
using stoker::IoJob;
using stoker::IoOptions;
using stoker::IoStatus;
using stoker::kIoAlign;

int failures = 0;

void check(bool condition, const std::string& what) {
  if (condition) return;
  ++failures;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

bool contains(const std::string& text, const std::string& part) {
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

std::unique_ptr<IoBackend> open(const Files& files, const std::string& backend, int readers,
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

bool uring_works(const Files& files) {
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

// Every position and length, several readers, jobs used again.
void test_bytes(const Files& files, const std::string& backend, bool direct) {
  const std::string name = backend + (direct ? "" : ", not direct");
  Order order;
  const std::unique_ptr<IoBackend> io = open(files, backend, 4, direct, &order);
  check(backend == "auto" || contains(io->description(), backend), io->description());
  if (!direct && backend == "pread_pool") {
    check(contains(io->description(), "buffered: as asked"), io->description());
  }
  std::mt19937_64 random(7);
  std::deque<Slot> slots(16);
  bool same = true, done = true;
  int64_t needed = 0;
  for (int round = 0; round < 20; ++round) {
    for (Slot& s : slots) {
      s.clear();
      const int n = 1 + static_cast<int>(random() % IoJob::kMaxReads);
      for (int i = 0; i < n; ++i) {
        const int32_t file = static_cast<int32_t>(random() % files.size());
        const uint64_t size = files[static_cast<size_t>(file)]->size();
        // Often the end of the file, whose last page is partial.
        const uint64_t most = std::min<uint64_t>(size, 50000);
        const uint64_t length = 1 + random() % most;
        const uint64_t begin = random() % 4 == 0 ? size - length : random() % (size - length + 1);
        s.add(file, begin, length);
        needed += static_cast<int64_t>(length);
      }
      io->submit(s.job, random() % 2 == 0);
    }
    for (Slot& s : slots) {
      s.wait();
      done &= s.status() == IoStatus::kDone && s.job.error.empty();
      done &= s.job.done_s >= s.job.submitted_s && s.job.submitted_s > 0;
      same &= s.same(files);
    }
    order.wait_ends(slots.size() * static_cast<size_t>(round + 1));
  }
  check(done, name + ": every job ends as kDone");
  check(same, name + ": exact bytes");
  const stoker::IoStatistics s = io->statistics();
  check(s.reads > 0 && s.bytes >= needed && s.busy_s > 0 && s.cancelled == 0,
        name + ": statistics: " + std::to_string(s.reads) + " reads, " + std::to_string(s.bytes) +
            " bytes, needed " + std::to_string(needed));
}

// Pages of the file that are in memory.
int64_t cached_pages(const TestFile& file) {
  const int fd = ::open(file.path().c_str(), O_RDONLY | O_CLOEXEC);
  void* map = ::mmap(nullptr, file.size(), PROT_READ, MAP_SHARED, fd, 0);
  ::close(fd);
  if (map == MAP_FAILED) return -1;
  const size_t page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
#if defined(__APPLE__)
  std::vector<char> in((file.size() + page - 1) / page);
#else
  std::vector<unsigned char> in((file.size() + page - 1) / page);
#endif
  const int result = ::mincore(map, file.size(), in.data());
  ::munmap(map, file.size());
  if (result != 0) return -1;
  return std::count_if(in.begin(), in.end(), [](auto c) { return (c & 1) != 0; });
}

void test_page_cache(const Files& files, bool uring) {
  // What opening alone leaves behind, after the pages that writing the file has left are gone.
  const int fd = ::open(files[0]->path().c_str(), O_RDONLY | O_CLOEXEC);
#if defined(POSIX_FADV_DONTNEED)
  ::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
#endif
  ::close(fd);
  if (cached_pages(*files[0]) != 0) {
    std::printf("page cache is not tested: this file system keeps its pages\n");
    return;
  }
  for (const bool direct : {true, false}) {
    for (const std::string backend : {"pread_pool", "uring"}) {
      if (backend == "uring" && !uring) continue;
      const std::unique_ptr<IoBackend> io = open(files, backend, 2, direct);
      Slot s(1 << 20);
      s.add(0, 0, 60000);
      s.add(0, 100000, 500000);
      s.add(0, files[0]->size() - 5000, 5000);
      io->submit(s.job, true);
      s.wait();
      check(s.status() == IoStatus::kDone && s.same(files), backend + ": read");
      check(cached_pages(*files[0]) == 0, backend + (direct ? ", direct" : ", buffered") +
                                              ": leaves no page cache, found " +
                                              std::to_string(cached_pages(*files[0])) + " pages");
    }
  }
}

void test_order(const Files& files, const std::string& backend) {
  Held held(files, backend);
  std::deque<Slot> slots(9);
  for (size_t i = 1; i < slots.size(); ++i) {
    slots[i].job.tag = i;
    slots[i].add(0, i * 40960, 3000);  // apart, so that none are joined
  }
  auto submit = [&](size_t i, bool demand) { held.io->submit(slots[i].job, demand); };
  submit(1, false);
  submit(2, false);
  submit(3, true);
  submit(4, false);
  submit(5, true);
  submit(6, false);
  submit(7, false);
  submit(8, true);
  held.io->promote(slots[6].job);
  held.io->promote(slots[3].job);    // is one: keeps its place
  held.io->promote(held.first.job);  // has ended
  check(held.io->cancel(slots[2].job), backend + ": a waiting job is cancelled");
  check(slots[2].status() == IoStatus::kCancelled, backend + ": and has ended");
  check(!held.io->cancel(slots[2].job), backend + ": but once");
  check(!held.io->cancel(held.first.job), backend + ": an ended job is not cancelled");
  check(held.io->cancel(slots[5].job), backend + ": a demand is cancelled");
  held.order.release();
  held.order.wait_ends(7);
  check(held.order.tags() == std::vector<uint64_t>({0, 3, 8, 6, 1, 4, 7}),
        backend + ": demands, then the promoted, then the others");
  for (size_t i = 1; i < slots.size(); ++i) {
    slots[i].wait();
    if (i == 2 || i == 5) continue;
    check(slots[i].status() == IoStatus::kDone && slots[i].same(files), backend + ": bytes");
  }
  check(held.io->statistics().cancelled == 2, backend + ": counts the cancelled");
}

void test_cancel_many(const Files& files, const std::string& backend) {
  constexpr size_t kJobs = 10000;
  Held held(files, backend);
  Slot memory;
  memory.add(0, 0, 100);
  std::vector<IoJob> jobs(kJobs);
  for (IoJob& job : jobs) {
    job.n_reads = 1;
    job.reads[0] = memory.job.reads[0];
    held.io->submit(job, false);
  }
  std::vector<size_t> shuffled(kJobs);
  for (size_t i = 0; i < kJobs; ++i) shuffled[i] = i;
  std::shuffle(shuffled.begin(), shuffled.end(), std::mt19937(5));
  for (size_t i = 0; i < kJobs / 2; ++i) held.io->promote(jobs[shuffled[i]]);
  size_t cancelled = 0;
  for (const size_t i : shuffled) cancelled += held.io->cancel(jobs[i]);
  check(cancelled == kJobs, backend + ": cancels 10,000 waiting jobs");
  check(std::all_of(jobs.begin(), jobs.end(),
                    [](const IoJob& j) { return j.status.load() == IoStatus::kCancelled; }),
        backend + ": all have ended");
  check(held.io->statistics().cancelled == static_cast<int64_t>(kJobs), backend + ": counted");
  Slot after;
  after.job.tag = 1;
  after.add(0, 5000, 9000);
  held.io->submit(after.job, false);
  held.order.release();
  after.wait();
  check(after.status() == IoStatus::kDone && after.same(files), backend + ": goes on afterwards");
  held.order.wait_ends(2);
  check(held.order.tags() == std::vector<uint64_t>({0, 1}), backend + ": the cancelled are silent");
}

// Small neighbours are read in one call when the only reader has them waiting.
void test_merged(const Files& files) {
  // Extents of 10,000 bytes touch inside a page; 8 x 40,960 begin where the one before ends; the
  // last ones reach the partial page at the end of the file.
  struct Case {
    const char* name;
    uint64_t begin, length;
    size_t jobs;
    int64_t calls;
  };
  const uint64_t end = files[0]->size();
  const Case cases[] = {
      {"shared pages", 12345, 10000, 12, 1},
      {"aligned", 81920, 40960, 8, 1},
      {"at the end of the file", end - 6 * 7001, 7001, 6, 1},
      {"within one page", 4100, 300, 5, 5},  // nothing to gain: no read goes beyond the first
      {"too large", 0, 300000, 3, 3},
      {"above 2 MiB", 0, 204800, 12, 2},
  };
  for (const Case& c : cases) {
    Held held(files, "pread_pool");
    const int64_t before = held.io->statistics().reads;
    std::deque<Slot> slots;
    for (size_t i = 0; i < c.jobs; ++i) {
      slots.emplace_back(512 * 1024);
      slots[i].add(0, c.begin + i * c.length, c.length);
      held.io->submit(slots[i].job, false);
    }
    held.order.release();
    bool same = true;
    for (Slot& s : slots) {
      s.wait();
      same &= s.status() == IoStatus::kDone && s.same(files);
    }
    check(same, std::string("joined reads, ") + c.name + ": exact bytes");
    held.order.wait_ends(c.jobs + 1);
    const int64_t calls = held.io->statistics().reads - before;
    check(calls == c.calls, std::string("joined reads, ") + c.name + ": expected " +
                                std::to_string(c.calls) + " calls, found " + std::to_string(calls));
  }
  // Three tensors of neighbouring experts: the reads of one job are apart, those of the next job
  // continue each of them.
  Held held(files, "pread_pool");
  const int64_t before = held.io->statistics().reads;
  std::deque<Slot> slots(4);
  for (size_t i = 0; i < slots.size(); ++i) {
    for (uint64_t t = 0; t < 3; ++t) slots[i].add(0, t * 700000 + 100 + i * 20000, 20000);
    held.io->submit(slots[i].job, true);
  }
  held.order.release();
  for (Slot& s : slots) {
    s.wait();
    check(s.status() == IoStatus::kDone && s.same(files), "joined tensors: exact bytes");
  }
  held.order.wait_ends(5);
  check(held.io->statistics().reads - before == 3, "joined tensors: one call each");
}

void test_faults(const Files& files) {
  {  // the third read, and only that
    Order order;
    const std::unique_ptr<IoBackend> io = open(files, "null:fail=3,delay=0..1ms", 1, true, &order);
    std::deque<Slot> slots(6);
    for (size_t i = 0; i < slots.size(); ++i) {
      slots[i].add(0, 4096 * (i + 10), 5000);
      io->submit(slots[i].job, true);
    }
    for (size_t i = 0; i < slots.size(); ++i) {
      slots[i].wait();
      check((slots[i].status() == IoStatus::kFailed) == (i == 2), "fail=3 fails the third read");
      check(slots[i].job.error.empty() == (i != 2), "an error where it failed");
    }
    const std::string& e = slots[2].job.error;
    check(contains(e, files[0]->path()) && contains(e, "offset 49152") &&
              contains(e, "expected 5000") && contains(e, "found 0") &&
              contains(e, "Input/output error") && !contains(e, "\n"),
          "the message names file, offset, expected and found: " + e);
    slots[2].clear();
    slots[2].add(0, 4096 * 12, 5000);
    io->submit(slots[2].job, true);
    slots[2].wait();
    check(
        slots[2].status() == IoStatus::kDone && slots[2].job.error.empty() && slots[2].same(files),
        "a job that failed can be submitted again");
  }
  {  // one read of several: the job fails, the others' bytes do not matter
    const std::unique_ptr<IoBackend> io = open(files, "null:fail=2", 1);
    Slot s;
    for (uint64_t i = 0; i < 4; ++i) s.add(0, i * 8192, 8000);
    io->submit(s.job, true);
    s.wait();
    check(s.status() == IoStatus::kFailed && contains(s.job.error, "offset 8192"), s.job.error);
  }
  {
    const std::unique_ptr<IoBackend> io = open(files, "null:short=1", 2);
    Slot s;
    s.add(0, 0, 50000);
    io->submit(s.job, true);
    s.wait();
    check(s.status() == IoStatus::kFailed && contains(s.job.error, "expected 50000 bytes, found "),
          s.job.error);
  }
  // The same seed fails the same reads, another seed others.
  std::vector<std::vector<bool>> failed;
  for (const char* seed : {"1", "1", "2"}) {
    const std::unique_ptr<IoBackend> io =
        open(files, std::string("null:eio=0.2,short=0.1,spike=2ms@0.05,seed=") + seed, 1);
    std::deque<Slot> slots(100);
    std::vector<bool> f;
    for (Slot& s : slots) {
      s.add(0, 0, 100);
      io->submit(s.job, false);
    }
    for (Slot& s : slots) {
      s.wait();
      f.push_back(s.status() == IoStatus::kFailed);
      check(f.back() || s.same(files), "what does not fail is exact");
    }
    failed.push_back(f);
  }
  const auto n = std::count(failed[0].begin(), failed[0].end(), true);
  check(10 <= n && n <= 50, "about 28 of 100 fail: " + std::to_string(n));
  check(failed[0] == failed[1] && failed[0] != failed[2], "faults follow from the seed");
  {  // reorder: all arrive, in another order, demands still first
    Held held(files, "null:reorder,seed=3");
    std::deque<Slot> slots(40);
    for (size_t i = 0; i < slots.size(); ++i) {
      slots[i].job.tag = i + 1;
      slots[i].add(0, i * 4096, 4096);
      held.io->submit(slots[i].job, i >= 20);
    }
    held.order.release();
    held.order.wait_ends(41);
    std::vector<uint64_t> tags = held.order.tags();
    check(!std::is_sorted(tags.begin() + 1, tags.begin() + 21), "reorder: another order");
    check(std::all_of(tags.begin() + 1, tags.begin() + 21, [](uint64_t t) { return t > 20; }),
          "reorder: demands first");
    std::sort(tags.begin(), tags.end());
    for (size_t i = 0; i < tags.size(); ++i) check(tags[i] == i, "reorder: each ends once");
  }
}

void test_changed_files(const std::string& backend) {
  Files files;
  files.push_back(std::make_unique<TestFile>("changing", 300001, 5));
  TestFile& file = *files[0];
  auto read = [&](IoBackend& io, uint64_t begin, uint64_t n, std::string* error) {
    Slot s;
    s.add(0, begin, n);
    io.submit(s.job, true);
    s.wait();
    *error = s.job.error;
    if (s.status() == IoStatus::kDone) check(s.same(files), backend + ": exact");
    return s.status();
  };
  std::string error;
  {
    const std::unique_ptr<IoBackend> io = open(files, backend, 2);
    check(read(*io, 200000, 50000, &error) == IoStatus::kDone, backend + ": before: " + error);
    check(::truncate(file.path().c_str(), 100000) == 0, "truncate");
    check(read(*io, 200000, 50000, &error) == IoStatus::kFailed, backend + ": beyond the new end");
    check(contains(error, file.path()) && contains(error, "changed while the model runs") &&
              contains(error, "300001") && contains(error, "100000") && !contains(error, "\n"),
          backend + ": truncated: " + error);
    check(read(*io, 80000, 40000, &error) == IoStatus::kFailed, backend + ": across the new end");
    // The bytes are there, and may still be what they were; nobody knows.
    check(read(*io, 0, 50000, &error) == IoStatus::kFailed, backend + ": before the new end");
    check(contains(error, "changed while the model runs"), error);
  }
  file.write(file.path(), 0);
  file.set_modified(1700000000);
  {
    const std::unique_ptr<IoBackend> io = open(files, backend, 2);
    check(read(*io, 1000, 50000, &error) == IoStatus::kDone, backend + ": restored: " + error);
    file.write(file.path(), 1);  // in place, the same size
    file.set_modified(1700000001);
    check(read(*io, 1000, 50000, &error) == IoStatus::kFailed, backend + ": written in place");
    check(contains(error, "changed while the model runs"), error);
  }
  file.write(file.path(), 0);
  {
    const std::unique_ptr<IoBackend> io = open(files, backend, 2);
    const std::string other = file.path() + ".new";
    file.write(other, 1);
    check(std::rename(other.c_str(), file.path().c_str()) == 0, "rename");
    // Another file has the name now; ours lives on as long as it is open.
    check(read(*io, 1000, 50000, &error) == IoStatus::kDone, backend + ": replaced: " + error);
  }
}

void test_closing(const Files& files, const std::string& backend) {
  std::deque<Slot> slots(50);
  Slot first;
  Order order(0);
  std::unique_ptr<IoBackend> io = open(files, backend, 1, true, &order);
  first.add(0, 0, 100);
  io->submit(first.job, true);
  order.wait_ends(1);
  for (size_t i = 0; i < slots.size(); ++i) {
    slots[i].job.tag = i + 1;
    for (uint64_t k = 0; k < 4; ++k) slots[i].add(0, (i + k * 60) * 4096, 5000);
    io->submit(slots[i].job, i % 3 == 0);
  }
  // The reader is held until the destructor has given the last one up.
  std::thread opens([&] {
    for (const Slot& s : slots) s.wait();
    order.release();
  });
  io.reset();
  opens.join();
  check(first.status() == IoStatus::kDone, backend + ": closing: what had ended stays");
  for (const Slot& s : slots) {
    check(s.status() == IoStatus::kCancelled, backend + ": closing cancels what waits");
  }
  check(order.tags().size() == 1, backend + ": closing: the cancelled are silent");

  // While reads are in flight: whatever is not cancelled is whole.
  for (int round = 0; round < 20; ++round) {
    io = open(files, backend, 3);
    for (size_t i = 0; i < slots.size(); ++i) {
      slots[i].clear();
      for (uint64_t k = 0; k < 4; ++k) slots[i].add(0, (i + k * 60) * 4096, 5000);
      io->submit(slots[i].job, i % 3 == 0);
    }
    if (round % 2 == 0) slots[static_cast<size_t>(round)].wait();
    io.reset();
    for (const Slot& s : slots) {
      const IoStatus status = s.status();
      check(status == IoStatus::kCancelled || (status == IoStatus::kDone && s.same(files)),
            backend + ": closing: ended, and exact if done");
    }
  }
}

// Everything at once, from one thread, over jobs that are used again and again.
void test_stress(const Files& files, const std::string& backend, bool faults) {
  class Count final : public stoker::IoListener {
   public:
    explicit Count(size_t n) : ends(n) {}
    void on_job_end(IoJob& job) override { ++ends[job.tag]; }
    std::vector<std::atomic<int>> ends;
  };
  constexpr size_t kSlots = 64;
  std::deque<Slot> slots(kSlots);
  Count count(kSlots);
  int expected[kSlots] = {};
  std::mt19937 random(11);
  int done = 0, failed = 0, cancelled = 0;
  bool same = true, once = true;
  std::unique_ptr<IoBackend> io = open(files, backend, 3, true, &count);
  // An ended job is the listener's until it has been told.
  auto settle = [&](size_t i) {
    const IoStatus status = slots[i].status();
    if (status == IoStatus::kPending) return false;
    if (status == IoStatus::kIdle) return true;
    if (status == IoStatus::kCancelled) {
      ++cancelled;
    } else {
      if (count.ends[i].load() != expected[i] + 1) return false;
      ++expected[i];
      status == IoStatus::kDone ? ++done : ++failed;
      if (status == IoStatus::kDone) same &= slots[i].same(files);
    }
    slots[i].job.status.store(IoStatus::kIdle);
    return true;
  };
  while (done + failed < 400) {
    const size_t i = random() % kSlots;
    Slot& s = slots[i];
    if (settle(i)) {
      s.clear();
      s.job.tag = i;
      const int n = 1 + static_cast<int>(random() % IoJob::kMaxReads);
      for (int k = 0; k < n; ++k) {
        const int32_t file = static_cast<int32_t>(random() % files.size());
        const uint64_t page = random() % (files[static_cast<size_t>(file)]->size() / 4096 - 2);
        s.add(file, page * 4096 + random() % 4096, 1 + random() % 4096);
      }
      io->submit(s.job, random() % 3 == 0);
    } else if (random() % 2 == 0) {
      io->promote(s.job);
    } else if (random() % 8 == 0 && io->cancel(s.job)) {
      once &= s.status() == IoStatus::kCancelled;
    }
  }
  for (size_t i = 0; i < kSlots; ++i) {
    while (!settle(i)) std::this_thread::yield();
  }
  const stoker::IoStatistics statistics = io->statistics();
  io.reset();
  for (size_t i = 0; i < kSlots; ++i) once &= count.ends[i].load() == expected[i];
  check(same, backend + ": stress: exact bytes");
  check(once, backend + ": stress: each job ends once");
  check(statistics.cancelled == cancelled, backend + ": stress: cancelled jobs are counted");
  check(done > 100 && cancelled > 0 && (failed > 0) == faults,
        backend + ": stress: " + std::to_string(done) + " done, " + std::to_string(failed) +
            " failed, " + std::to_string(cancelled) + " cancelled");
}

void test_refusals(const Files& files) {
  using stoker::ErrorKind;
  const std::string path = files[0]->path();
  const uint64_t size = files[0]->size();
  auto opened = [&](const std::string& p, uint64_t n, const std::string& backend, int readers) {
    IoOptions options;
    options.backend = backend;
    options.readers = readers;
    stoker::open_io({p}, {n}, options, nullptr);
  };
  std::string e =
      error_of(ErrorKind::kModelFile, [&] { opened(path + ".none", size, "pread_pool", 4); });
  check(contains(e, path + ".none") && contains(e, "No such file"), "a missing file: " + e);
  e = error_of(ErrorKind::kModelFile, [&] { opened(path, size + 1, "pread_pool", 4); });
  check(contains(e, path) && contains(e, std::to_string(size)) &&
            contains(e, std::to_string(size + 1)),
        "another size: " + e);
  e = error_of(ErrorKind::kModelFile, [&] { opened(TestFile::folder(), 4096, "pread_pool", 4); });
  check(contains(e, "regular file"), "a folder: " + e);
  for (const char* backend : {"aio", "", "pread_pool:x", ":", "auto:"}) {
    e = error_of(ErrorKind::kOption, [&] { opened(path, size, backend, 4); });
    check(contains(e, "pread_pool") && contains(e, "uring") && contains(e, "auto"),
          std::string("unknown backend ") + backend + ": " + e);
  }
  for (const int readers : {0, -1, 100000}) {
    e = error_of(ErrorKind::kOption, [&] { opened(path, size, "pread_pool", readers); });
    check(contains(e, std::to_string(readers)), "readers: " + e);
  }
  for (const char* script : {"delay",       "delay=",           "delay=5..1ms",    "delay=-1ms",
                             "delay=1e3ms", "delay=99999999ms", "eio=2",           "eio=x",
                             "short=",      "spike=5ms",        "spike=5ms@",      "spike=@0.1",
                             "fail=0",      "fail=x",           "fail=1.5",        "seed=-1",
                             "reorder=1",   "unknown",          "eio=0.1,,seed=1", "delay=.ms"}) {
    e = error_of(ErrorKind::kOption, [&] { opened(path, size, std::string("null:") + script, 4); });
    check(contains(e, "fail=N"), std::string("script ") + script + ": " + e);
  }
  // What only a mistake of ours can ask for.
  const std::unique_ptr<IoBackend> io = open(files, "pread_pool", 1);
  auto refused = [&](auto change) {
    Slot s;
    s.add(0, 0, 5000);
    change(s.job);
    try {
      io->submit(s.job, true);
    } catch (const std::invalid_argument&) {
      return s.status() == IoStatus::kIdle;
    }
    s.wait();
    return false;
  };
  check(refused([](IoJob& j) { j.reads[0].offset = 100; }), "an offset inside a page");
  check(refused([](IoJob& j) { j.reads[0].bytes = 5000; }), "a length that is no multiple");
  check(refused([](IoJob& j) { j.reads[0].into += 1; }), "memory that is not aligned");
  check(refused([](IoJob& j) { j.reads[0].needed = 8193; }), "more needed than asked");
  check(refused([](IoJob& j) { j.reads[0].file = 99; }), "an unknown file");
  check(refused([](IoJob& j) { j.n_reads = 0; }), "no reads");
}

// Memory-backed file systems refuse direct I/O or take it for what it is: bytes are exact anyway.
void test_fallback(const std::string& path) {
  std::error_code none;
  if (!std::filesystem::is_directory(path, none)) return;
  const std::string name = path + "/io_test_" + std::to_string(::getpid());
  TestFile pattern("pattern", 100003, 9);
  pattern.write(name, 0);
  stoker::IoOptions options;
  const std::unique_ptr<IoBackend> io = stoker::open_io({name}, {100003}, options, nullptr);
  Slot s(128 * 1024);
  s.add(0, 5, 99998);
  io->submit(s.job, true);
  s.wait();
  check(s.status() == IoStatus::kDone && pattern.same(s.job.reads[0].into, 0, 100003),
        path + ": exact bytes: " + s.job.error);
  std::printf("%s: %s\n", path.c_str(), io->description().c_str());
  std::filesystem::remove(name);
}

}  // namespace

int main() {
  {
    Files files;
    files.push_back(std::make_unique<TestFile>("first", (3 << 20) + 777, 1));
    files.push_back(std::make_unique<TestFile>("second", 163840, 2));
    files.push_back(std::make_unique<TestFile>("third", 12289, 3));
    const bool uring = uring_works(files);
    std::vector<std::string> backends = {"pread_pool", "mmap", "null"};
    if (uring) backends.push_back("uring");
    for (const std::string& b : backends) {
      test_bytes(files, b, true);
      test_bytes(files, b, false);
      test_order(files, b);
      test_cancel_many(files, b);
      test_changed_files(b);
      test_closing(files, b);
      test_stress(files, b, false);
    }
    test_bytes(files, "auto", true);
    test_stress(files, "null:delay=0..0.2ms,reorder,eio=0.02,short=0.02,spike=3ms@0.002,seed=5",
                true);
    test_page_cache(files, uring);
    test_merged(files);
    test_faults(files);
    test_refusals(files);
    test_fallback("/dev/shm");
    {  // nothing to choose by in a small file, much in one of 40 MB
      Files large;
      large.push_back(std::make_unique<TestFile>("large", (40 << 20) + 5, 4));
      const std::unique_ptr<IoBackend> io = open(large, "auto", 4);
      std::printf("auto: %s\n", io->description().c_str());
      test_bytes(large, "auto", true);
    }
  }
  std::filesystem::remove(TestFile::folder());
  std::printf("io_test: %d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
