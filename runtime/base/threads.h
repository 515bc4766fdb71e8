// A pool of compute threads that spin briefly for the next phase and then park. One phase runs at
// a time; the caller is thread 0. Sessions on several Python threads share a pool: each takes it
// for one evaluation through Lease.
//
// A pool has fewer threads than requested where the system gives no more. In a process that is
// forked from its own it starts new threads with the first lease.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#include "runtime/base/own_process.h"

namespace stoker {

class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return size_; }

  // Sets how long workers spin for the next phase. The brief spin is about 100 microseconds: longer
  // than the serial code between two phases of a token, and too short to matter for the battery.
  // The patient one is about a millisecond, for tokens that wait for reads between phases; waking a
  // parked worker costs such a token a tenth of its time.
  void be_patient(bool patient) { spins_.store(patient ? 60000 : 4000); }

  // The process whose threads these are.
  const OwnProcess& process() const { return process_; }
  // Forbids leases in a forked process: the pool's user has other threads too, which that lacks.
  void stay_in_process() { stays_ = true; }

  // Exclusive use of the pool. Workers spin for the next phase and then park. Throws Error(kOption)
  // in a process that was forked while a lease was held, or after stay_in_process().
  class Lease {
   public:
    explicit Lease(ThreadPool& pool) : lock_(pool.use()) {}

   private:
    std::unique_lock<std::mutex> lock_;
  };

  // Calls f(begin, end, thread) over [0, n) in pieces of `grain`, handed out as threads become
  // free. f must not throw. Returns when all pieces are done.
  template <class F>
  void parallel_for(int64_t n, int64_t grain, F&& f) {
    if (n <= 0) return;
    if (size_ == 1 || n <= grain) {
      f(int64_t{0}, n, 0);
      return;
    }
    next_.store(0, std::memory_order_relaxed);
    struct Loop {
      ThreadPool* pool;
      int64_t n, grain;
      std::remove_reference_t<F>* f;
    } loop{this, n, grain, &f};
    run(
        [](void* context, int thread) {
          auto* l = static_cast<Loop*>(context);
          for (;;) {
            int64_t begin = l->pool->next_.fetch_add(l->grain, std::memory_order_relaxed);
            if (begin >= l->n) return;
            int64_t end = begin + l->grain < l->n ? begin + l->grain : l->n;
            (*l->f)(begin, end, thread);
          }
        },
        &loop);
  }

 private:
  using Body = void (*)(void* context, int thread);
  void run(Body body, void* context);
  void work(int thread);
  std::mutex& use() {
    if (!process_.here()) move_here();
    return use_;
  }
  void move_here();

  OwnProcess process_;
  bool stays_ = false;
  int size_ = 1;
  std::mutex use_, moving_;
  // The state of one worker.
  struct alignas(64) Place {
    std::atomic<bool> inside{false};  // the phase
    int thread = 0, clock = 0;        // the system's numbers for it and its time; set before inside
  };
  void await_workers();

  // The caller writes these before state_ opens a phase to the workers.
  Body body_ = nullptr;
  void* context_ = nullptr;
  // The phase's number, whether it is open, and how many workers are inside (threads.cc). A worker
  // that comes when it is closed has no part in it.
  alignas(64) std::atomic<uint32_t> state_{0};
  alignas(64) std::atomic<int64_t> next_{0};  // next item of parallel_for
  alignas(64) std::atomic<bool> stop_{false};
  std::atomic<bool> caller_sleeps_{false};  // until no worker is inside
  std::atomic<int> spins_{4000};
  std::unique_ptr<Place[]> places_;  // [threads - 1]
  std::vector<std::thread> workers_;
};

}  // namespace stoker
