#include "offload/io/measure.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <new>
#include <random>
#include <thread>
#include <vector>

#include "offload/io/backends.h"
#include "offload/io/job_queue.h"
#include "runtime/base/errors.h"

namespace stoker {

namespace {

constexpr uint64_t kPiece = uint64_t{256} << 10;
constexpr int kJobs = 8;  // of one backend in a round: 2 MB
constexpr int kMaxRounds = 8;
// A slow disk ends the measurement early, without an answer, because both backends then wait for
// the disk.
constexpr double kMaxSeconds = 0.045;
// uring must be faster by this factor: rounds differ by a tenth from noise alone, and only
// pread_pool joins small neighbours.
constexpr double kMargin = 1.25;

struct AlignedDelete {
  void operator()(uint8_t* p) const { ::operator delete(p, std::align_val_t(kIoAlign)); }
};

// Returns the seconds of one round of kJobs jobs at places of its own; < 0 where a read failed or
// the round would have passed the deadline.
double round_seconds(IoBackend& io, int32_t file, const uint64_t* places, uint8_t* into,
                     double deadline) {
  std::array<IoJob, kJobs> jobs;
  const double begin = io_now();
  for (int i = 0; i < kJobs; ++i) {
    IoJob& job = jobs[static_cast<size_t>(i)];
    job.n_reads = 1;
    job.reads[0] = {file, places[i] * kPiece, kPiece, kPiece, into + uint64_t(i) * kPiece};
    io.submit(job, true);
  }
  double end = begin;
  bool failed = false;
  for (IoJob& job : jobs) {
    while (job.status.load(std::memory_order_acquire) == IoStatus::kPending) {
      if (io_now() > deadline && io.cancel(job)) break;
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
    failed |= job.status.load(std::memory_order_relaxed) != IoStatus::kDone;
    end = std::max(end, job.done_s);
  }
  return failed ? -1 : end - begin;
}

}  // namespace

bool uring_is_faster(const std::shared_ptr<const IoFiles>& files, const IoOptions& options) {
  if (files->size() == 0) return false;
  int32_t file = 0;
  for (int32_t i = 1; i < files->size(); ++i) {
    if (files->nbytes(i) > files->nbytes(file)) file = i;
  }
  const uint64_t pieces = files->nbytes(file) / kPiece;
  if (pieces < 2 * kMaxRounds * kJobs) return false;

  std::unique_ptr<IoBackend> backends[2];  // pread_pool, uring
  try {
    backends[1] = open_uring(files, options, nullptr);
  } catch (const Error&) {
    return false;
  }
  backends[0] = open_pread_pool(files, options, nullptr);

  const std::unique_ptr<uint8_t, AlignedDelete> memory(
      static_cast<uint8_t*>(::operator new(kJobs* kPiece, std::align_val_t(kIoAlign))));
  // The two backends read different places, because the storage may cache what the other has read.
  std::vector<uint64_t> places(pieces);
  for (uint64_t i = 0; i < pieces; ++i) places[i] = i;
  std::minstd_rand random(1);
  double seconds[2] = {0, 0};
  const double deadline = io_now() + kMaxSeconds;
  size_t used = 0;
  for (int round = 0; round < kMaxRounds; ++round) {
    double now[2] = {0, 0};
    for (int k = 0; k < 2; ++k) {
      for (int i = 0; i < kJobs; ++i) {
        std::swap(places[used + i], places[used + i + random() % (pieces - used - i)]);
      }
      const int which = (k + round) % 2;  // each goes first in every other round
      now[which] = round_seconds(*backends[which], file, &places[used], memory.get(), deadline);
      used += kJobs;
    }
    if (now[0] < 0 || now[1] < 0) {
      if (round == 0) return false;
      break;  // only whole rounds count
    }
    seconds[0] += now[0];
    seconds[1] += now[1];
  }
  return seconds[1] * kMargin < seconds[0];
}

}  // namespace stoker
