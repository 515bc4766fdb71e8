// The I/O layer when things go wrong: scripted faults, files that change or are not what was said,
// closing with work to do, file systems that refuse direct I/O.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "tests/native/io_fixture.h"

namespace {

using namespace io_fixture;

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

void test_page_cache(const Files& files, const std::string& backend) {
  if (backend == "mmap" || backend == "null") return;  // they read through it
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
    const std::unique_ptr<IoBackend> io = open(files, backend, 2, direct);
    Slot s(1 << 20);
    s.add(0, 0, 60000);
    s.add(0, 100000, 500000);
    s.add(0, files[0]->size() - 5000, 5000);
    io->submit(s.job, true);
    s.wait();
    check(s.status() == IoStatus::kDone && s.same(files), backend + ": read");
    const int64_t left = cached_pages(*files[0]);
    check(left == 0, backend + (direct ? ", direct" : ", buffered") +
                         ": leaves no page cache, found " + std::to_string(left) + " pages");
  }
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
    order.wait_ends(slots.size());
    const std::string& e = slots[2].job.error;
    check(contains(e, files[0]->path()) && contains(e, "offset 49152") &&
              contains(e, "expected 5000") && contains(e, "found 0") &&
              contains(e, "Input/output error") && !contains(e, "\n"),
          "the message names file, offset, expected and found: " + e);
    slots[2].clear();
    slots[2].add(0, 4096 * 12, 5000);
    io->submit(slots[2].job, true);
    slots[2].wait();
    order.wait_ends(slots.size() + 1);
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

  // While reads are in read_index: whatever is not cancelled is whole.
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
    const Files files = three_files();
    for (const std::string& b : usable_backends(files)) {
      test_changed_files(b);
      test_closing(files, b);
      test_page_cache(files, b);
    }
    test_faults(files);
    test_refusals(files);
    test_fallback("/dev/shm");
  }
  return report("io_faults_test");
}
