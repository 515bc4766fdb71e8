// Reads from flash. A job is the reads of one unit; it is submitted once, may overtake others by
// promotion, may be cancelled, and ends exactly once.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace stoker {

// Direct I/O wants offsets, lengths and addresses in multiples of this.
constexpr uint64_t kIoAlign = 4096;

struct Read {
  int32_t file = 0;         // index into the backend's files
  uint64_t offset = 0;      // multiple of kIoAlign
  uint64_t bytes = 0;       // multiple of kIoAlign; may reach beyond the end of the file
  uint64_t needed = 0;      // bytes from `offset` that must arrive, <= bytes: the file has them
  uint8_t* into = nullptr;  // aligned to kIoAlign, room for `bytes`
};

enum class IoStatus : int { kIdle, kPending, kDone, kFailed, kCancelled };

// Owned by the caller; must live, and its memory with it, until the status is past kPending and,
// where a listener looks at the job, until on_job_end has returned.
struct IoJob {
  static constexpr int kMaxReads = 4;
  std::array<Read, kMaxReads> reads;
  int n_reads = 0;
  uint64_t tag = 0;  // the caller's
  // kPending from submit() until the job ends; the store that ends it is a release, so that who
  // reads kDone (acquire) sees the bytes.
  std::atomic<IoStatus> status{IoStatus::kIdle};
  std::string error;       // valid once status is kFailed: file, what was expected, what was found
  double submitted_s = 0;  // steady clock; set by submit()
  double done_s = 0;       // set before the job ends
  // The backend's own: see job_queue.h.
  int io_left = 0;
  unsigned io_begun = 0;
  bool io_demand = false;
  bool io_queued = false;
  IoJob* io_before = nullptr;
  IoJob* io_after = nullptr;
};

struct IoStatistics {
  int64_t reads = 0;      // system calls that completed
  int64_t bytes = 0;      // that arrived
  double busy_s = 0;      // time during which at least one read was in read_index
  int64_t cancelled = 0;  // jobs
};

// Called on an I/O thread after a job has ended as kDone or kFailed (its status is set). Must be
// quick; must not call back into the backend. Not called for kCancelled: that ends on the thread
// that cancels (or destroys the backend), which knows.
struct IoListener {
  virtual void on_job_end(IoJob& job) = 0;

 protected:
  ~IoListener() = default;
};

class IoBackend {
 public:
  virtual ~IoBackend() =
      default;  // waits for what is in read_index; pending jobs end as kCancelled
  // demand: before every job that is not. Within a priority: first come, first served.
  virtual void submit(IoJob& job, bool demand) = 0;
  // A waiting job becomes a demand; nothing where it is one or has ended.
  virtual void promote(IoJob& job) = 0;
  // Ends the job as kCancelled if none of its reads has begun: true. Otherwise it goes on: false.
  virtual bool cancel(IoJob& job) = 0;
  virtual IoStatistics statistics() const = 0;
  // For people: "pread_pool, 4 readers, direct" or "..., buffered: the file system refuses direct
  // I/O (tmpfs)".
  virtual std::string description() const = 0;
};

struct IoOptions {
  std::string backend = "pread_pool";  // a name of io_backends.inc, "auto", or "null:SCRIPT"
  int readers = 4;                     // concurrent reads
  bool direct = true;
};

// Files are opened, their sizes compared with `sizes`, and direct I/O verified once by comparing a
// piece with a buffered read; falls back to buffered reads where that fails. Throws
// Error(kModelFile) where a file cannot be opened or has another size, Error(kOption) for an
// unknown backend.
std::unique_ptr<IoBackend> open_io(const std::vector<std::string>& paths,
                                   const std::vector<uint64_t>& sizes, const IoOptions& options,
                                   IoListener* listener);

}  // namespace stoker
