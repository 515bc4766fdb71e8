#include "offload/io/reader_pool.h"

#include <utility>

#include "offload/io/end_job.h"
#include "offload/io/quiet_thread.h"

namespace stoker {

ReaderPool::ReaderPool(std::string name, std::shared_ptr<const IoFiles> files,
                       std::unique_ptr<ReadMethod> method, int readers, IoListener* listener)
    : name_(std::move(name)),
      files_(std::move(files)),
      method_(std::move(method)),
      listener_(listener) {
  readers_.reserve(static_cast<size_t>(readers));
  for (int i = 0; i < readers; ++i) {
    try {
      readers_.push_back(quiet_thread([this] { serve(); }));
    } catch (...) {  // no more threads are available: fewer readers suffice
      if (i == 0) throw;
      break;
    }
  }
}

ReaderPool::~ReaderPool() { close(); }

void ReaderPool::close() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
    bool ended = false;
    while (IoJob* job = queue_.give_up(&ended)) {
      if (ended) end_cancelled(*job);
    }
  }
  wake_.notify_all();
  for (std::thread& t : readers_) t.join();
}

void ReaderPool::submit(IoJob& job, bool demand) {
  check_job(*files_, job);
  bool wake = false;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    start_job(job);
    queue_.push(job, demand);
    wake = idle_ > 0;
  }
  // Only one reader is woken; it wakes the next one if there is more to do, so that the caller, who
  // has a token to compute, pays for one wake-up however many reads the job has.
  if (wake) wake_.notify_one();
}

void ReaderPool::promote(IoJob& job) {
  const std::lock_guard<std::mutex> lock(mutex_);
  queue_.promote(job);
}

bool ReaderPool::cancel(IoJob& job) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!queue_.cancel(job)) return false;
  ++statistics_.cancelled;
  end_cancelled(job);
  return true;
}

IoStatistics ReaderPool::statistics() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  IoStatistics s = statistics_;
  if (in_flight_ > 0) s.busy_s += io_now() - busy_from_;
  return s;
}

std::string ReaderPool::description() const {
  return name_ + ", " + std::to_string(readers_.size()) +
         (readers_.size() == 1 ? " reader, " : " readers, ") + files_->mode();
}

void ReaderPool::serve() {
  TakenRead taken[JobQueue::kMaxMerged];
  ReadOutcome outcomes[JobQueue::kMaxMerged];
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    while (queue_.empty()) {
      if (closing_) return;
      ++idle_;
      wake_.wait(lock);
      --idle_;
    }
    const int64_t number = begun_;
    taken[0] = queue_.take(method_->reorders() ? method_->choose(queue_.waiting(), number) : 0);
    // While another reader sleeps, it can read the neighbour at the same time instead.
    int n = 1;
    if (idle_ == 0 && method_->merges()) n = queue_.take_following(taken);
    begun_ += n;
    if (in_flight_++ == 0) busy_from_ = io_now();
    const bool wake = idle_ > 0 && !queue_.empty();
    lock.unlock();
    if (wake) wake_.notify_one();

    bool merged = false;
    if (n > 1) {
      const Read* reads[JobQueue::kMaxMerged];
      for (int i = 0; i < n; ++i) {
        reads[i] = &taken[i].read();
        outcomes[i] = {};
      }
      merged = method_->read_merged(reads, n, &outcomes[0]);
    }
    if (!merged) {
      for (int i = 0; i < n; ++i) outcomes[i] = method_->read(taken[i].read(), number + i);
    }

    lock.lock();
    if (--in_flight_ == 0) statistics_.busy_s += io_now() - busy_from_;
    int n_ended = 0;
    for (int i = 0; i < n; ++i) {
      statistics_.reads += outcomes[i].calls;
      statistics_.bytes += outcomes[i].bytes;
      IoJob& job = *taken[i].job;
      if (queue_.end_read(job, outcomes[i].error)) taken[n_ended++].job = &job;
    }
    if (n_ended > 0) {
      lock.unlock();
      for (int i = 0; i < n_ended; ++i) end_job(*files_, *taken[i].job, listener_);
      lock.lock();
    }
  }
}

}  // namespace stoker
