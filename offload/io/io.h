// Jobs that read from flash. A job holds the reads of one unit; it is submitted once, may overtake
// others by promotion, may be cancelled, and ends exactly once.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace stoker {

// Direct I/O needs offsets, lengths and addresses that are multiples of this.
constexpr uint64_t kIoAlign = 4096;

struct Read {
  int32_t file = 0;         // index into the backend's files
  uint64_t offset = 0;      // multiple of kIoAlign
  uint64_t bytes = 0;       // multiple of kIoAlign; may reach beyond the end of the file
  uint64_t needed = 0;      // bytes from `offset` that must arrive, <= bytes: the file has them
  uint8_t* into = nullptr;  // aligned to kIoAlign, room for `bytes`
};

enum class IoStatus : int { kIdle, kPending, kDone, kFailed, kCancelled };

// The caller owns a job; the job and its memory must live until the status is past kPending and,
// where a listener looks at the job, until on_job_end has returned.
struct IoJob {
  static constexpr int kMaxReads = 4;
  std::array<Read, kMaxReads> reads;
  int n_reads = 0;
  uint64_t tag = 0;  // free for the caller
  // The status is kPending from submit() until the job ends; the store that ends it is a release,
  // so that a reader who sees kDone (acquire) sees the bytes.
  std::atomic<IoStatus> status{IoStatus::kIdle};
  std::string error;       // valid once status is kFailed: file, what was expected, what was found
  double submitted_s = 0;  // on the steady clock; set by submit()
  double done_s = 0;       // set before the job ends
  // The fields below belong to the backend: see job_queue.h.
  int io_left = 0;
  unsigned io_begun = 0;
  bool io_demand = false;
  bool io_queued = false;
  IoJob* io_before = nullptr;
  IoJob* io_after = nullptr;
};

struct IoStatistics {
  int64_t reads = 0;      // completed system calls
  int64_t bytes = 0;      // bytes that arrived
  double busy_s = 0;      // time during which at least one read was in flight
  int64_t cancelled = 0;  // cancelled jobs
};

// on_job_end is called on an I/O thread after a job has ended as kDone or kFailed (its status is
// set). It must be quick and must not call back into the backend. It is not called for kCancelled,
// because the thread that cancels (or destroys the backend) knows of that end.
struct IoListener {
  virtual void on_job_end(IoJob& job) = 0;

 protected:
  ~IoListener() = default;
};

class IoBackend {
 public:
  virtual ~IoBackend() = default;  // waits for the reads in flight; pending jobs end as kCancelled
  // Submits a job. Demands come before all other jobs; within a priority the order is first come,
  // first served.
  virtual void submit(IoJob& job, bool demand) = 0;
  // Makes a waiting job a demand; does nothing where it is one or has ended.
  virtual void promote(IoJob& job) = 0;
  // Ends the job as kCancelled and returns true if none of its reads has begun. Otherwise the job
  // goes on and the result is false.
  virtual bool cancel(IoJob& job) = 0;
  virtual IoStatistics statistics() const = 0;
  // Returns a description for people: "pread_pool, 4 readers, direct" or "..., buffered: the file
  // system refuses direct I/O (tmpfs)".
  virtual std::string description() const = 0;
};

struct IoOptions {
  std::string backend = "pread_pool";  // a name of io_backends.inc, "auto", or "null:SCRIPT"
  int readers = 4;                     // concurrent reads
  bool direct = true;
};

// Opens the files, compares their sizes with `sizes`, and verifies direct I/O once by comparing a
// piece with a buffered read; falls back to buffered reads where that fails. Throws
// Error(kModelFile) where a file cannot be opened or has another size, Error(kOption) for an
// unknown backend.
std::unique_ptr<IoBackend> open_io(const std::vector<std::string>& paths,
                                   const std::vector<uint64_t>& sizes, const IoOptions& options,
                                   IoListener* listener);

}  // namespace stoker
