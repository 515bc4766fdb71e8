// How a job is checked at its submission and ended, the same for every backend.
#pragma once

#include <stdexcept>

#include "offload/io/files.h"
#include "offload/io/io.h"
#include "offload/io/job_queue.h"

namespace stoker {

// Throws std::invalid_argument where a job cannot be submitted.
inline void check_job(const IoFiles& files, const IoJob& job) {
  if (job.n_reads < 1 || job.n_reads > IoJob::kMaxReads) {
    throw std::invalid_argument("IoJob: expected 1 to 4 reads, found " +
                                std::to_string(job.n_reads));
  }
  if (job.status.load(std::memory_order_relaxed) == IoStatus::kPending) {
    throw std::invalid_argument("IoJob: submitted twice");
  }
  for (int i = 0; i < job.n_reads; ++i) files.check(job.reads[static_cast<size_t>(i)]);
}

inline void start_job(IoJob& job) {
  job.submitted_s = io_now();
  job.done_s = 0;
  job.status.store(IoStatus::kPending, std::memory_order_relaxed);
}

inline void end_cancelled(IoJob& job) {
  job.done_s = io_now();
  job.status.store(IoStatus::kCancelled, std::memory_order_release);
}

// Ends a job; called on an I/O thread, without the backend's lock, when no read of the job is left.
// The job belongs to its owner again once its status is stored.
inline void end_job(const IoFiles& files, IoJob& job, IoListener* listener) {
  IoStatus status = JobQueue::outcome(job);
  // The check follows the arrival of the bytes, so that it also finds a write made before the read.
  for (int i = 0; status == IoStatus::kDone && i < job.n_reads; ++i) {
    const int32_t file = job.reads[static_cast<size_t>(i)].file;
    if (i > 0 && file == job.reads[static_cast<size_t>(i - 1)].file) continue;
    job.error = files.changed(file);
    if (!job.error.empty()) status = IoStatus::kFailed;
  }
  job.done_s = io_now();
  job.status.store(status, std::memory_order_release);
  if (listener && status != IoStatus::kCancelled) listener->on_job_end(job);
}

}  // namespace stoker
