// FlashReader is an I/O backend with a way to wait for its jobs.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <span>

#include "offload/io/io.h"
#include "offload/units/unit.h"

namespace stoker {

class FlashReader : private IoListener {
 public:
  FlashReader(const std::vector<std::string>& paths, const std::vector<uint64_t>& sizes,
              const IoOptions& options);
  FlashReader(const FlashReader&) = delete;
  FlashReader& operator=(const FlashReader&) = delete;

  IoBackend& io() { return *backend_; }
  const IoBackend& io() const { return *backend_; }

  // Returns the number of jobs that have ended so far, modulo 2^32. A caller reads it, looks at the
  // jobs, then calls wait() for more.
  uint32_t ended() const { return ended_.load(std::memory_order_acquire); }
  // Returns once ended() differs from `seen`, or after 20 ms.
  void wait(uint32_t seen);
  // Returns once the job has ended. poll is called every 20 ms and may throw.
  void await(const IoJob& job, const std::function<void()>& poll);
  // Cancels those of the jobs that have not begun, and waits for the others.
  void end(std::span<IoJob* const> jobs);

  // Reads extents to memory. `into[i]` has the layout of a page-aligned copy: byte 0 of extent i is
  // at into[i] + offset % kIoAlign. poll is called every 20 ms and may throw. Throws
  // Error(kDevice), Error(kModelFile).
  struct Piece {
    Extent extent;
    uint8_t* into;
  };
  void read_all(std::span<const Piece> pieces, const std::function<void()>& poll);

 private:
  void on_job_end(IoJob& job) override;

  std::atomic<uint32_t> ended_{0};
  std::atomic<bool> waiting_{false};
  std::mutex mutex_;
  std::condition_variable changed_;
  std::unique_ptr<IoBackend> backend_;  // the last member: its threads call on_job_end
};

// Throws the failed job's error as an exception.
[[noreturn]] void throw_failed(const IoJob& job);

}  // namespace stoker
