// Jobs that wait, and the books of those begun. No lock of its own: its backend's.
//
// Two lists, demands and the rest, each first come first served and linked through the jobs
// themselves (io_before, io_after), so that nothing is allocated and that promotion and
// cancellation take the same time however many jobs wait. A job is in a list (io_queued) while a
// read of it waits; io_begun has bit i set once its read i has begun; io_left counts the reads that
// have not ended. A job whose read failed, or that a closing backend gives up, leaves its list and
// loses the reads that had not begun.
#pragma once

#include "offload/io/io.h"

namespace stoker {

// One read of a job, taken out of the queue.
struct TakenRead {
  IoJob* job = nullptr;
  int index = 0;
  const Read& read() const { return job->reads[static_cast<size_t>(index)]; }
};

class JobQueue {
 public:
  static constexpr int kMaxMerged = 16;  // reads in one call
  static constexpr uint64_t kMaxMergedBytes = uint64_t{2} << 20;
  // Throughput is flat from here on: larger reads gain nothing from being joined.
  static constexpr uint64_t kSmallRead = uint64_t{256} << 10;

  bool empty() const { return !lists_[0].first && !lists_[1].first; }
  void push(IoJob& job, bool demand);
  void promote(IoJob& job);
  // Takes a job out of which no read has begun: true. Sets no status.
  bool cancel(IoJob& job);

  // The next read: demands first. `skip` reads of the same priority are passed over (for tests);
  // at most waiting() - 1.
  TakenRead take(int skip = 0);
  // Reads that wait in the list that take() would serve.
  int waiting() const;
  // After a take(): the small reads of the same priority, among the next few jobs, that continue
  // taken[0] in its file. Adds them at taken[1..]; returns the number of reads in `taken`.
  int take_following(TakenRead* taken);

  // A read ended; error is empty or says why it failed. True if it was the job's last: the caller
  // then calls end_job().
  bool end_read(IoJob& job, const std::string& error);
  // For a backend that closes: the next waiting job leaves its list, without the reads that have
  // not begun. True where none of the others is in read_index: the caller ends the job.
  IoJob* give_up(bool* ended);
  // The status of a job of which no read is left.
  static IoStatus outcome(const IoJob& job);

 private:
  struct List {
    IoJob* first = nullptr;
    IoJob* last = nullptr;
  };

  List& list(const IoJob& job) { return lists_[job.io_demand ? 0 : 1]; }
  void append(IoJob& job);
  void remove(IoJob& job);
  TakenRead begin(IoJob& job, int index);
  void abandon(IoJob& job);

  List lists_[2];  // demands, others
};

// Seconds of the steady clock.
double io_now();

}  // namespace stoker
