#include "runtime/base/threads.h"

#include "runtime/base/start_threads.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#endif

namespace stoker {

namespace {

// state_: the phase's number from this bit on; below it whether the phase is open, and the number
// of workers inside.
constexpr int kPhase = 12;
constexpr uint32_t kOpen = 1u << (kPhase - 1), kInside = kOpen - 1;

// A phase ends within microseconds after its last piece was taken, unless a worker lost its core.
constexpr int kSpinsBeforeLook = 2000;
// So long a thread that has a core makes progress that its clock shows.
constexpr int kSpinsOfALook = 300;

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

#if defined(__linux__)

// Lends the caller's core to threads of this process that wait for one, while it lives. On a busy
// machine the system leaves such a thread behind another program for milliseconds, and everybody
// waits for the piece that it has begun.
class LentCore {
 public:
  LentCore() = default;
  LentCore(const LentCore&) = delete;
  LentCore& operator=(const LentCore&) = delete;
  ~LentCore() {
    for (const Borrower& b : borrowers_) ::sched_setaffinity(b.thread, sizeof b.cores, &b.cores);
  }

  // Lends it to a thread whose clock stands still. Returns whether it did.
  bool lend(pid_t thread, clockid_t clock) {
    const int64_t before = nanoseconds(clock);
    for (int i = 0; i < kSpinsOfALook; ++i) pause();
    if (before < 0 || nanoseconds(clock) != before) return false;
    Borrower b{thread, {}};
    cpu_set_t mine;
    CPU_ZERO(&mine);
    const int core = ::sched_getcpu();
    if (core < 0 || core >= CPU_SETSIZE) return false;
    CPU_SET(core, &mine);
    if (::sched_getaffinity(thread, sizeof b.cores, &b.cores) != 0) return false;
    if (::sched_setaffinity(thread, sizeof mine, &mine) != 0) return false;
    borrowers_.push_back(b);
    return true;
  }

 private:
  struct Borrower {
    pid_t thread;
    cpu_set_t cores;  // that it may use otherwise
  };
  static int64_t nanoseconds(clockid_t clock) {
    timespec t;
    if (::clock_gettime(clock, &t) != 0) return -1;
    return int64_t{t.tv_sec} * 1000000000 + t.tv_nsec;
  }

  std::vector<Borrower> borrowers_;
};

#endif

}  // namespace

ThreadPool::ThreadPool(int threads)
    : places_(std::make_unique<Place[]>(static_cast<size_t>(threads > 1 ? threads - 1 : 0))),
      workers_(start_threads(threads - 1, [this](int i) { work(i + 1); })) {
  size_ = static_cast<int>(workers_.size()) + 1;
}

void ThreadPool::move_here() {
  const std::lock_guard lock(moving_);
  if (process_.here()) return;
  // The lock of somebody who is not here is never given back.
  if (stays_ || !use_.try_lock()) process_.require();
  use_.unlock();
  // Handles of threads that are not here can neither be joined nor destroyed.
  new std::vector<std::thread>(std::move(workers_));
  state_.store(0);
  workers_ = start_threads(size_ - 1, [this](int i) { work(i + 1); });
  size_ = static_cast<int>(workers_.size()) + 1;
  process_.adopt();
}

ThreadPool::~ThreadPool() {
  stop_.store(true);
  state_.fetch_add(1u << kPhase, std::memory_order_release);
  state_.notify_all();
  join(workers_);
}

void ThreadPool::run(Body body, void* context) {
  body_ = body;
  context_ = context;
  const uint32_t last = state_.load(std::memory_order_relaxed);
  state_.store(((last >> kPhase) + 1) << kPhase | kOpen, std::memory_order_release);
  state_.notify_all();
  body(context, 0);
  // Every piece is taken: a worker that has not come yet would find none.
  if (state_.fetch_and(~kOpen, std::memory_order_acq_rel) & kInside) await_workers();
}

void ThreadPool::await_workers() {
  const auto busy = [&] { return (state_.load(std::memory_order_acquire) & kInside) != 0; };
  for (;;) {
    for (int spins = 0; spins < kSpinsBeforeLook; ++spins) {
      if (!busy()) return;
      pause();
    }
#if defined(__linux__)
    LentCore core;
    bool lent = false;
    for (int i = 0; i + 1 < size_; ++i) {
      const Place& p = places_[static_cast<size_t>(i)];
      if (p.inside.load(std::memory_order_acquire)) lent |= core.lend(p.thread, p.clock);
    }
    if (!lent) {  // it computes, or the system does not let us lend
      std::this_thread::yield();
      continue;
    }
    caller_sleeps_.store(true);
    for (;;) {
      const uint32_t state = state_.load();
      if (!(state & kInside)) break;
      state_.wait(state);
    }
    caller_sleeps_.store(false);
#else
    std::this_thread::yield();
#endif
  }
}

void ThreadPool::work(int thread) {
  Place& place = places_[static_cast<size_t>(thread - 1)];
#if defined(__linux__)
  place.thread = static_cast<int>(::syscall(SYS_gettid));
  clockid_t clock;
  if (::pthread_getcpuclockid(::pthread_self(), &clock) == 0) place.clock = clock;
#endif
  uint32_t seen = 0;
  for (;;) {
    uint32_t state = state_.load(std::memory_order_acquire);
    for (int spins = 0; state >> kPhase == seen && !stop_.load(std::memory_order_relaxed);
         ++spins) {
      if (spins < spins_.load(std::memory_order_relaxed)) {
        pause();
      } else {
        state_.wait(state, std::memory_order_acquire);
      }
      state = state_.load(std::memory_order_acquire);
    }
    seen = state >> kPhase;
    if (stop_.load(std::memory_order_relaxed)) return;
    while ((state & kOpen) && state >> kPhase == seen) {
      if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) continue;
      place.inside.store(true, std::memory_order_release);
      body_(context_, thread);
      place.inside.store(false, std::memory_order_release);
      const bool last = (state_.fetch_sub(1) & kInside) == 1;
      if (last && caller_sleeps_.load()) state_.notify_all();
      break;
    }
  }
}

}  // namespace stoker
