#include "offload/flash_reader.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "runtime/core/errors.h"

namespace stoker {

namespace {

// Reads of this size use all the bandwidth of the disks that we measured, and several of them
// spread over the readers.
constexpr uint64_t kPieceBytes = uint64_t{1} << 20;
// How often somebody who waits looks for Ctrl-C.
constexpr std::chrono::milliseconds kPoll{20};

}  // namespace

FlashReader::FlashReader(const std::vector<std::string>& paths, const std::vector<uint64_t>& sizes,
                         const IoOptions& options)
    : backend_(open_io(paths, sizes, options, this)) {}

void FlashReader::on_job_end(IoJob&) {
  ended_.fetch_add(1);
  if (waiting_.load()) {
    // Under the mutex, so that the notification cannot fall between the waiter's look and its
    // sleep.
    const std::lock_guard lock(mutex_);
    changed_.notify_all();
  }
}

void FlashReader::wait(uint32_t seen) {
  std::unique_lock lock(mutex_);
  waiting_.store(true);
  changed_.wait_for(lock, kPoll, [&] { return ended_.load() != seen; });
  waiting_.store(false);
}

void FlashReader::read_all(std::span<const Piece> pieces, const std::function<void()>& poll) {
  std::vector<Read> reads;
  for (const Piece& p : pieces) {
    const uint64_t end = p.extent.offset + p.extent.bytes;
    uint64_t offset = p.extent.offset / kIoAlign * kIoAlign;
    uint8_t* into = p.into;
    while (offset < end) {
      Read r;
      r.file = p.extent.shard;
      r.offset = offset;
      r.needed = std::min(end - offset, kPieceBytes);
      r.bytes = (r.needed + kIoAlign - 1) / kIoAlign * kIoAlign;
      r.into = into;
      reads.push_back(r);
      offset += r.bytes;
      into += r.bytes;
    }
  }
  std::vector<IoJob> jobs(reads.size());
  for (size_t i = 0; i < reads.size(); ++i) {
    jobs[i].reads[0] = reads[i];
    jobs[i].n_reads = 1;
    backend_->submit(jobs[i], true);
  }
  // Whatever happens, the jobs must have ended before they go.
  const auto settle = [&](size_t first) {
    for (size_t i = first; i < jobs.size(); ++i) backend_->cancel(jobs[i]);
    for (size_t i = first; i < jobs.size(); ++i) {
      for (;;) {
        const uint32_t seen = ended();
        if (jobs[i].status.load(std::memory_order_acquire) != IoStatus::kPending) break;
        wait(seen);
      }
    }
  };
  for (size_t i = 0; i < jobs.size(); ++i) {
    try {
      for (;;) {
        const uint32_t seen = ended();
        if (jobs[i].status.load(std::memory_order_acquire) != IoStatus::kPending) break;
        wait(seen);
        if (poll) poll();
      }
      if (jobs[i].status.load() != IoStatus::kDone) throw_failed(jobs[i]);
    } catch (...) {
      settle(i);
      throw;
    }
  }
}

void throw_failed(const IoJob& job) { throw Error(ErrorKind::kDevice, job.error); }

}  // namespace stoker
