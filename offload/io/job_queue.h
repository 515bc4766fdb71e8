// JobQueue holds the jobs that wait and tracks the reads of those that have begun. It has no lock
// of its own: the backend's lock protects it.
//
// It keeps two lists, demands and the rest, each first come first served and linked through the
// jobs themselves (io_before, io_after), so that nothing is allocated and that promotion and
// cancellation take the same time however many jobs wait. A job is in a list (io_queued) while a
// read of it waits; io_begun has bit i set once its read i has begun; io_left counts the reads that
// have not ended. A job whose read failed, or that a closing backend gives up, leaves its list and
// loses the reads that had not begun.
#pragma once

#include "offload/io/io.h"

namespace stoker {

// One read of a job that was taken out of the queue.
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
  // Removes a job none of whose reads has begun and returns true. It sets no status.
  bool cancel(IoJob& job);

  // Takes the next read, demands first. It passes over `skip` reads of the same priority (for
  // tests); `skip` is at most waiting() - 1.
  TakenRead take(int skip = 0);
  // Returns the number of reads that wait in the list that take() would serve.
  int waiting() const;
  // Takes, after a take(), the small reads of the same priority, among the next few jobs, that
  // continue taken[0] in its file. Adds them at taken[1..]; returns the number of reads in `taken`.
  int take_following(TakenRead* taken);

  // Records that a read ended; error is empty or says why it failed. Returns true if it was the
  // job's last read: the caller then calls end_job().
  bool end_read(IoJob& job, const std::string& error);
  // Removes the next waiting job from its list, for a backend that closes, and drops its reads that
  // have not begun. *ended is true where none of its other reads is in flight: the caller then ends
  // the job.
  IoJob* give_up(bool* ended);
  // Returns the status of a job that has no reads left.
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
