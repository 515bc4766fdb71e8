// The I/O layer of offloading: exact bytes on every backend, order, promotion, cancellation, joined
// reads. Where an order matters, the only reader is held inside the listener, so that nothing here
// depends on how long a read takes.
#include <algorithm>
#include <atomic>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "tests/native/io_fixture.h"

namespace {

using namespace io_fixture;

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
  check(done > 100 && (failed > 0) == faults, backend + ": stress: " + std::to_string(done) +
                                                  " done, " + std::to_string(failed) + " failed, " +
                                                  std::to_string(cancelled) + " cancelled");
}

}  // namespace

int main() {
  {
    const Files files = three_files();
    for (const std::string& b : usable_backends(files)) {
      test_bytes(files, b, true);
      test_bytes(files, b, false);
      test_order(files, b);
      test_cancel_many(files, b);
      test_stress(files, b, false);
    }
    test_bytes(files, "auto", true);
    test_stress(files, "null:delay=0..0.2ms,reorder,eio=0.02,short=0.02,spike=3ms@0.002,seed=5",
                true);
    test_merged(files);
    {  // nothing to choose by in a small file, much in one of 40 MB
      Files large;
      large.push_back(std::make_unique<TestFile>("large", (40 << 20) + 5, 4));
      std::printf("auto: %s\n", open(large, "auto", 4)->description().c_str());
      test_bytes(large, "auto", true);
    }
  }
  return report("io_test");
}
