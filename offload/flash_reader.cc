#include "offload/flash_reader.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "runtime/base/errors.h"

namespace stoker {

namespace {

// Reads of this size use all the bandwidth of the disks that we measured, and several of them
// spread over the readers.
constexpr uint64_t kPieceBytes = uint64_t{1} << 20;
// How often a waiting caller checks for Ctrl-C.
constexpr std::chrono::milliseconds kPoll{20};

}  // namespace

FlashReader::FlashReader(const std::vector<std::string>& paths, const std::vector<uint64_t>& sizes,
                         const IoOptions& options)
    : backend_(open_io(paths, sizes, options, this)) {}

void FlashReader::on_job_end(IoJob&) {
  ended_.fetch_add(1);
  if (waiting_.load()) {
    // The mutex is held so that the notification cannot fall between the waiter's check and its
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

void FlashReader::await(const IoJob& job, const std::function<void()>& poll) {
  for (;;) {
    const uint32_t seen = ended();
    if (job.status.load(std::memory_order_acquire) != IoStatus::kPending) return;
    wait(seen);
    if (poll) poll();
  }
}

void FlashReader::end(std::span<IoJob* const> jobs) {
  for (IoJob* job : jobs) backend_->cancel(*job);
  for (const IoJob* job : jobs) await(*job, {});
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
  for (size_t i = 0; i < jobs.size(); ++i) {
    try {
      await(jobs[i], poll);
      if (jobs[i].status.load() != IoStatus::kDone) throw_failed(jobs[i]);
    } catch (...) {
      // The jobs must have ended before they are destroyed.
      std::vector<IoJob*> rest;
      for (size_t j = i; j < jobs.size(); ++j) rest.push_back(&jobs[j]);
      end(rest);
      throw;
    }
  }
}

void throw_failed(const IoJob& job) { throw Error(ErrorKind::kDevice, job.error); }

}  // namespace stoker
