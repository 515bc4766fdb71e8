#include "runtime/core/threads.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace stoker {

namespace {

// A phase ends within microseconds unless a worker lost its core; then yield to let it run.
constexpr int kSpinsBeforeYield = 2000;

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

ThreadPool::ThreadPool(int threads) : size_(threads < 1 ? 1 : threads) {
  for (int i = 1; i < size_; ++i) workers_.emplace_back([this, i] { work(i); });
}

ThreadPool::~ThreadPool() {
  stop_.store(true);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (auto& w : workers_) w.join();
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
