// ReaderPool is a set of threads that read, each blocking in one call at a time. A ReadMethod
// defines what a read is (a pread, a copy from a map, a scripted fault).
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "offload/io/files.h"
#include "offload/io/io.h"
#include "offload/io/job_queue.h"

namespace stoker {

// Several threads call its methods at once, except choose().
class ReadMethod {
 public:
  virtual ~ReadMethod() = default;
  // Performs read number `number` (from 0, in the order in which reads begin).
  virtual ReadOutcome read(const Read& read, int64_t number) = 0;
  // Whether several small neighbours may become one call, and the function that makes that call
  // (IoFiles::read_merged).
  virtual bool merges() const { return false; }
  virtual bool read_merged(const Read* const* reads, int n, ReadOutcome* outcome) {
    (void)reads, (void)n, (void)outcome;
    return false;
  }
  // Chooses which of `waiting` reads of one priority begins as number `number`: 0 is the oldest.
  virtual bool reorders() const { return false; }
  virtual int choose(int waiting, int64_t number) const {
    (void)waiting, (void)number;
    return 0;
  }
};

class ReaderPool final : public IoBackend {
 public:
  // name: the backend's, for description(). 1 <= readers; each has one thread.
  ReaderPool(std::string name, std::shared_ptr<const IoFiles> files,
             std::unique_ptr<ReadMethod> method, int readers, IoListener* listener);
  ~ReaderPool() override;

  void submit(IoJob& job, bool demand) override;
  void promote(IoJob& job) override;
  bool cancel(IoJob& job) override;
  IoStatistics statistics() const override;
  std::string description() const override;

 private:
  void serve();
  void close();

  const std::string name_;
  const std::shared_ptr<const IoFiles> files_;
  const std::unique_ptr<ReadMethod> method_;
  IoListener* const listener_;

  mutable std::mutex mutex_;
  std::condition_variable wake_;
  // mutex_ protects these fields.
  JobQueue queue_;
  IoStatistics statistics_;
  int64_t begun_ = 0;     // number of reads
  int in_flight_ = 0;     // readers in a call
  double busy_from_ = 0;  // since when in_flight_ > 0
  int idle_ = 0;          // readers that sleep
  bool closing_ = false;

  std::vector<std::thread> readers_;
};

}  // namespace stoker
