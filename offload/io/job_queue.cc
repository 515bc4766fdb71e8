#include "offload/io/job_queue.h"

#include <chrono>

namespace stoker {

namespace {

constexpr int kMergeLookahead = 16;  // jobs

bool waits(const IoJob& job, int index) { return !(job.io_begun >> index & 1u); }

unsigned all_reads(const IoJob& job) { return (1u << job.n_reads) - 1; }

}  // namespace

double io_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void JobQueue::append(IoJob& job) {
  List& l = list(job);
  job.io_before = l.last;
  job.io_after = nullptr;
  (l.last ? l.last->io_after : l.first) = &job;
  l.last = &job;
  job.io_queued = true;
}

void JobQueue::remove(IoJob& job) {
  List& l = list(job);
  (job.io_before ? job.io_before->io_after : l.first) = job.io_after;
  (job.io_after ? job.io_after->io_before : l.last) = job.io_before;
  job.io_before = job.io_after = nullptr;
  job.io_queued = false;
}

void JobQueue::push(IoJob& job, bool demand) {
  job.io_left = job.n_reads;
  job.io_begun = 0;
  job.io_demand = demand;
  job.error.clear();
  append(job);
}

void JobQueue::promote(IoJob& job) {
  if (job.io_demand) return;
  if (!job.io_queued) return;
  remove(job);
  job.io_demand = true;
  append(job);
}

bool JobQueue::cancel(IoJob& job) {
  if (!job.io_queued || job.io_begun != 0) return false;
  remove(job);
  return true;
}

TakenRead JobQueue::begin(IoJob& job, int index) {
  job.io_begun |= 1u << index;
  if (job.io_begun == all_reads(job)) remove(job);
  return {&job, index};
}

int JobQueue::waiting() const {
  int n = 0;
  for (const IoJob* job = lists_[lists_[0].first ? 0 : 1].first; job; job = job->io_after) {
    for (int i = 0; i < job->n_reads; ++i) n += waits(*job, i);
  }
  return n;
}

TakenRead JobQueue::take(int skip) {
  for (IoJob* job = lists_[lists_[0].first ? 0 : 1].first; job; job = job->io_after) {
    for (int i = 0; i < job->n_reads; ++i) {
      if (waits(*job, i) && skip-- == 0) return begin(*job, i);
    }
  }
  return {};
}

int JobQueue::take_following(TakenRead* taken) {
  const Read& first = taken[0].read();
  if (first.bytes >= kSmallRead) return 1;
  uint64_t end = first.offset + first.bytes;
  int n = 1;
  IoJob* job = list(*taken[0].job).first;
  for (int seen = 0; job && seen < kMergeLookahead && n < kMaxMerged; ++seen) {
    IoJob* const next = job->io_after;  // begin() may remove `job` from its list
    for (int i = 0; i < job->n_reads && n < kMaxMerged; ++i) {
      const Read& r = job->reads[static_cast<size_t>(i)];
      if (!waits(*job, i) || r.file != first.file || r.bytes >= kSmallRead) continue;
      // Neighbours whose sizes are not multiples of a page share one.
      if (r.offset != end && r.offset + kIoAlign != end) continue;
      const uint64_t r_end = r.offset + r.bytes;
      if (r_end <= end || r_end - first.offset > kMaxMergedBytes) continue;
      end = r_end;
      taken[n++] = begin(*job, i);
    }
    job = next;
  }
  return n;
}

void JobQueue::abandon(IoJob& job) {
  if (!job.io_queued) return;
  for (int i = 0; i < job.n_reads; ++i) job.io_left -= waits(job, i);
  remove(job);
}

bool JobQueue::end_read(IoJob& job, const std::string& error) {
  --job.io_left;
  if (!error.empty()) {
    if (job.error.empty()) job.error = error;
    abandon(job);
  }
  return job.io_left == 0;
}

IoJob* JobQueue::give_up(bool* ended) {
  IoJob* job = lists_[lists_[0].first ? 0 : 1].first;
  if (job) {
    abandon(*job);
    *ended = job->io_left == 0;
  }
  return job;
}

IoStatus JobQueue::outcome(const IoJob& job) {
  if (!job.error.empty()) return IoStatus::kFailed;
  return job.io_begun == all_reads(job) ? IoStatus::kDone : IoStatus::kCancelled;
}

}  // namespace stoker
