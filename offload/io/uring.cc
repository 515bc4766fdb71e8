// This backend uses io_uring on Linux, without liburing: one ring, one thread that fills it from
// the queue, sleeps in the kernel until something has completed, and ends the jobs. An eventfd that
// the ring polls wakes the thread for new jobs. Many kernels and containers refuse io_uring
// (Android's apps, Docker's default profile); pread_pool is used there.
#include <memory>
#include <string>
#include <utility>

#include "offload/io/backends.h"
#include "runtime/base/errors.h"

#if defined(__linux__) && __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#include <sys/syscall.h>
#if defined(__NR_io_uring_setup) && defined(IO_URING_OP_SUPPORTED)  // the header of Linux 5.6
#define STOKER_URING 1
#endif
#endif

#if STOKER_URING

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include "offload/io/end_job.h"
#include "offload/io/job_queue.h"
#include "offload/io/quiet_thread.h"

namespace stoker {

namespace {

[[noreturn]] void refuse(const std::string& what, int error) {
  throw Error(ErrorKind::kOption,
              "io backend uring: expected a kernel that allows io_uring, found " + what + ": " +
                  std::strerror(error) + "; pread_pool works everywhere");
}

// The submission and completion rings that are shared with the kernel. One thread uses them.
//
// Entries are written at the submission tail and consumed by the kernel from the head; completions
// go the other way. Each side owns one index and publishes it with a release store.
class Ring {
 public:
  // Makes room for `entries` requests that have not completed.
  explicit Ring(unsigned entries) {
    struct io_uring_params p = {};
    descriptor_ = static_cast<int>(::syscall(__NR_io_uring_setup, entries, &p));
    if (descriptor_ < 0) refuse("io_uring_setup", errno);
    try {
      require_reads();
      map(p);
    } catch (...) {
      close();
      throw;
    }
  }
  ~Ring() { close(); }
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  // Adds a cleared entry, which the next enter() hands to the kernel. The caller must stay below
  // `entries`.
  struct io_uring_sqe& add(uint64_t user_data) {
    const unsigned slot = tail_ & sq_mask_;
    struct io_uring_sqe& sqe = sqes_[slot];
    std::memset(&sqe, 0, sizeof sqe);
    sqe.user_data = user_data;
    sq_array_[slot] = slot;
    ++tail_;
    return sqe;
  }

  // Submits what was added and sleeps until at least one request has completed. Returns 0 or an
  // errno.
  int enter() {
    __atomic_store_n(sq_tail_, tail_, __ATOMIC_RELEASE);
    const unsigned waiting = tail_ - __atomic_load_n(sq_head_, __ATOMIC_ACQUIRE);
    const long n = ::syscall(__NR_io_uring_enter, descriptor_, waiting, 1u, IORING_ENTER_GETEVENTS,
                             nullptr, 0);
    return n < 0 ? errno : 0;
  }

  // Calls on_completion(user_data, result) for each completion so far.
  template <typename F>
  void reap(F on_completion) {
    unsigned head = *cq_head_;
    while (head != __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE)) {
      const struct io_uring_cqe cqe = cqes_[head & cq_mask_];
      __atomic_store_n(cq_head_, ++head, __ATOMIC_RELEASE);
      on_completion(cqe.user_data, cqe.res);
    }
  }

  // Takes back the requests that the kernel refuses: calls on_completion(user_data, -error) for
  // each.
  template <typename F>
  void take_back(int error, F on_completion) {
    const unsigned head = __atomic_load_n(sq_head_, __ATOMIC_ACQUIRE);
    std::vector<uint64_t> users;
    for (unsigned i = head; i != tail_; ++i) users.push_back(sqes_[i & sq_mask_].user_data);
    tail_ = head;
    __atomic_store_n(sq_tail_, tail_, __ATOMIC_RELEASE);
    for (const uint64_t u : users) on_completion(u, -error);
  }

 private:
  void require_reads() const {
    alignas(struct io_uring_probe)
        uint8_t memory[sizeof(struct io_uring_probe) + 256 * sizeof(struct io_uring_probe_op)] = {};
    auto* probe = reinterpret_cast<struct io_uring_probe*>(memory);
    if (::syscall(__NR_io_uring_register, descriptor_, IORING_REGISTER_PROBE, probe, 256) != 0) {
      refuse("no IORING_REGISTER_PROBE", errno);
    }
    if (probe->last_op < IORING_OP_READ ||
        !(probe->ops[IORING_OP_READ].flags & IO_URING_OP_SUPPORTED)) {
      refuse("no IORING_OP_READ", ENOSYS);
    }
  }

  uint8_t* map_part(uint64_t bytes, uint64_t offset) {
    void* p = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, descriptor_,
                     static_cast<off_t>(offset));
    if (p == MAP_FAILED) refuse("no memory for its rings", errno);
    maps_.emplace_back(p, bytes);
    return static_cast<uint8_t*>(p);
  }

  void map(const struct io_uring_params& p) {
    uint64_t sq_bytes = p.sq_off.array + p.sq_entries * sizeof(uint32_t);
    const uint64_t cq_bytes = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
    const bool single = (p.features & IORING_FEAT_SINGLE_MMAP) != 0;
    if (single) sq_bytes = std::max(sq_bytes, cq_bytes);
    uint8_t* sq = map_part(sq_bytes, IORING_OFF_SQ_RING);
    uint8_t* cq = single ? sq : map_part(cq_bytes, IORING_OFF_CQ_RING);
    sqes_ = reinterpret_cast<struct io_uring_sqe*>(
        map_part(p.sq_entries * sizeof(struct io_uring_sqe), IORING_OFF_SQES));
    const auto word = [](uint8_t* base, uint32_t at) {
      return reinterpret_cast<unsigned*>(base + at);
    };
    sq_head_ = word(sq, p.sq_off.head);
    sq_tail_ = word(sq, p.sq_off.tail);
    sq_mask_ = *word(sq, p.sq_off.ring_mask);
    sq_array_ = word(sq, p.sq_off.array);
    cq_head_ = word(cq, p.cq_off.head);
    cq_tail_ = word(cq, p.cq_off.tail);
    cq_mask_ = *word(cq, p.cq_off.ring_mask);
    cqes_ = reinterpret_cast<struct io_uring_cqe*>(cq + p.cq_off.cqes);
    tail_ = *sq_tail_;
  }

  void close() {
    for (const auto& [p, bytes] : maps_) ::munmap(p, bytes);
    maps_.clear();
    if (descriptor_ >= 0) ::close(descriptor_);
    descriptor_ = -1;
  }

  int descriptor_ = -1;
  std::vector<std::pair<void*, uint64_t>> maps_;
  unsigned tail_ = 0;  // tail of the submissions, not yet published
  unsigned* sq_head_ = nullptr;
  unsigned* sq_tail_ = nullptr;
  unsigned* sq_array_ = nullptr;
  unsigned sq_mask_ = 0;
  unsigned* cq_head_ = nullptr;
  unsigned* cq_tail_ = nullptr;
  unsigned cq_mask_ = 0;
  struct io_uring_sqe* sqes_ = nullptr;
  struct io_uring_cqe* cqes_ = nullptr;
};

class Uring final : public IoBackend {
 public:
  // depth: the most reads in flight.
  Uring(std::shared_ptr<const IoFiles> files, int depth, IoListener* listener)
      : files_(std::move(files)),
        listener_(listener),
        slots_(static_cast<size_t>(depth)),
        ring_(static_cast<unsigned>(depth) + 1) {  // one more for the poll of wake_
    wake_ = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (wake_ < 0) refuse("eventfd", errno);
    try {
      thread_ = quiet_thread([this] { serve(); });
    } catch (...) {
      ::close(wake_);
      throw;
    }
  }

  ~Uring() override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
      bool ended = false;
      while (IoJob* job = queue_.give_up(&ended)) {
        if (ended) end_cancelled(*job);
      }
    }
    wake();
    thread_.join();
    ::close(wake_);
  }

  void submit(IoJob& job, bool demand) override {
    check_job(*files_, job);
    bool asleep = false;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      start_job(job);
      queue_.push(job, demand);
      // A full ring looks at the queue only when a read has completed.
      asleep = in_flight_ < slots_.size() && !woken_;
      woken_ |= asleep;
    }
    if (asleep) wake();
  }

  void promote(IoJob& job) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    queue_.promote(job);
  }

  bool cancel(IoJob& job) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!queue_.cancel(job)) return false;
    ++statistics_.cancelled;
    end_cancelled(job);
    return true;
  }

  IoStatistics statistics() const override {
    const std::lock_guard<std::mutex> lock(mutex_);
    IoStatistics s = statistics_;
    if (in_flight_ > 0) s.busy_s += io_now() - busy_from_;
    return s;
  }

  std::string description() const override {
    return "uring, depth " + std::to_string(slots_.size()) + ", " + files_->mode();
  }

 private:
  // A read in flight; the number of its slot is the request's user_data.
  struct Slot {
    TakenRead taken;  // job null: free
    uint64_t got = 0;
    ReadOutcome outcome;
  };
  static constexpr uint64_t kWake = UINT64_MAX;  // user_data of the poll
  static constexpr uint64_t kMaxPiece = uint64_t{1} << 30;

  void wake() {
    const uint64_t one = 1;
    // The write fails only when the counter is full, which wakes as well.
    if (::write(wake_, &one, sizeof one) < 0) return;
  }

  void serve() {
    bool polled = false;
    for (;;) {
      if (!fill()) return;
      if (!polled) {
        struct io_uring_sqe& sqe = ring_.add(kWake);
        sqe.opcode = IORING_OP_POLL_ADD;
        sqe.fd = wake_;
        sqe.poll_events = POLLIN;
        polled = true;
      }
      const auto complete = [&](uint64_t user, int64_t result) {
        if (user != kWake) {
          on_read(user, result);
          return;
        }
        polled = false;
        uint64_t count = 0;
        // The eventfd is cleared before the queue is looked at, so that a later submission wakes
        // again.
        if (::read(wake_, &count, sizeof count) < 0) return;
        const std::lock_guard<std::mutex> lock(mutex_);
        woken_ = false;
      };
      const int error = ring_.enter();
      // The kernel is short of memory for the moment, or requires that completions are taken first.
      const bool again = error == EAGAIN || error == EBUSY || error == EINTR || error == ENOMEM;
      if (error != 0 && !again) ring_.take_back(error, complete);
      if (error != 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      ring_.reap(complete);
    }
  }

  // Takes reads from the queue while slots are free. Returns false when the backend closes and no
  // read is in flight.
  bool fill() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = 0; i < slots_.size() && in_flight_ < slots_.size() && !queue_.empty(); ++i) {
      if (slots_[i].taken.job) continue;
      slots_[i].taken = queue_.take();
      slots_[i].got = 0;
      slots_[i].outcome = {};
      if (in_flight_++ == 0) busy_from_ = io_now();
      request(i);
    }
    return !closing_ || in_flight_ > 0;
  }

  void request(size_t i) {
    const Slot& slot = slots_[i];
    const Read& r = slot.taken.read();
    const uint64_t from = IoFiles::resume(slot.got);
    struct io_uring_sqe& sqe = ring_.add(i);
    sqe.opcode = IORING_OP_READ;
    sqe.fd = files_->descriptor(r.file);
    sqe.addr = reinterpret_cast<uint64_t>(r.into + from);
    sqe.len = static_cast<uint32_t>(std::min(r.bytes - from, kMaxPiece));
    sqe.off = r.offset + from;
  }

  void on_read(size_t i, int64_t result) {
    Slot& slot = slots_[i];
    const Read& r = slot.taken.read();
    if (files_->advance(r, result, &slot.got, &slot.outcome)) {
      request(i);
      return;
    }
    files_->drop_cache(r.file, r.offset, r.bytes);
    IoJob& job = *slot.taken.job;
    bool ended = false;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (--in_flight_ == 0) statistics_.busy_s += io_now() - busy_from_;
      statistics_.reads += slot.outcome.calls;
      statistics_.bytes += slot.outcome.bytes;
      ended = queue_.end_read(job, slot.outcome.error);
      slot.taken.job = nullptr;
    }
    if (ended) end_job(*files_, job, listener_);
  }

  const std::shared_ptr<const IoFiles> files_;
  IoListener* const listener_;
  int wake_ = -1;

  // Only the ring thread uses these fields.
  std::vector<Slot> slots_;
  Ring ring_;

  mutable std::mutex mutex_;
  // mutex_ protects these fields.
  JobQueue queue_;
  IoStatistics statistics_;
  size_t in_flight_ = 0;
  double busy_from_ = 0;
  bool woken_ = false;  // wake_ was written and not yet read
  bool closing_ = false;

  std::thread thread_;
};

}  // namespace

std::unique_ptr<IoBackend> open_uring(std::shared_ptr<const IoFiles> files,
                                      const IoOptions& options, IoListener* listener) {
  return std::make_unique<Uring>(std::move(files), options.readers, listener);
}

}  // namespace stoker

#else

namespace stoker {

std::unique_ptr<IoBackend> open_uring(std::shared_ptr<const IoFiles>, const IoOptions&,
                                      IoListener*) {
  throw Error(ErrorKind::kOption,
              "io backend uring: expected a build for Linux with io_uring, found another");
}

}  // namespace stoker

#endif  // STOKER_URING
