#include "runtime/base/threads.h"

#include "runtime/base/start_threads.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace stoker {

namespace {

// A phase ends within microseconds unless a worker lost its core; then the caller yields to let it
// run.
constexpr int kSpinsBeforeYield = 2000;

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

ThreadPool::ThreadPool(int threads)
    : workers_(start_threads(threads - 1, [this](int i) { work(i + 1); })) {
  size_ = static_cast<int>(workers_.size()) + 1;
}

void ThreadPool::move_here() {
  const std::lock_guard lock(moving_);
  if (process_.here()) return;
  // A lock whose holder is not in this process is never released.
  if (stays_ || !use_.try_lock()) process_.require();
  use_.unlock();
  // Handles of threads that are not in this process can neither be joined nor destroyed, so they
  // are leaked.
  new std::vector<std::thread>(std::move(workers_));
  generation_.store(0);
  workers_ = start_threads(size_ - 1, [this](int i) { work(i + 1); });
  size_ = static_cast<int>(workers_.size()) + 1;
  process_.adopt();
}

ThreadPool::~ThreadPool() {
  stop_.store(true);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  join(workers_);
}

void ThreadPool::run(Body body, void* context) {
  body_ = body;
  context_ = context;
  running_.store(size_ - 1, std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  body(context, 0);
  for (int spins = 0; running_.load(std::memory_order_acquire) != 0; ++spins) {
    if (spins < kSpinsBeforeYield) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
}

void ThreadPool::work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    for (int spins = 0; generation_.load(std::memory_order_acquire) == seen; ++spins) {
      if (spins < spins_.load(std::memory_order_relaxed)) {
        pause();
      } else {
        generation_.wait(seen, std::memory_order_acquire);
      }
    }
    // The caller starts no further phase before running_ is 0, so none is skipped here.
    ++seen;
    if (stop_.load(std::memory_order_relaxed)) return;
    body_(context_, thread);
    running_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace stoker
