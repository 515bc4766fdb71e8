// The weights that every token uses, where they do not all fit the memory: some pieces stay, the
// others pass through a ring, read ahead in the order of use.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "offload/flash_reader.h"
#include "offload/statistics.h"
#include "offload/plan/stream_plan.h"
#include "offload/units/step.h"
#include "runtime/base/memory.h"

namespace stoker {

// Used by one thread at a time: the evaluating one, under the pool's lease.
class WeightStream {
 public:
  // lookup: a matrix of which forward passes look up single rows, the embeddings; it may be one of
  // the plan's tensors as well. Reads the pinned weights. poll: as FlashReader::read_all.
  WeightStream(std::shared_ptr<FlashReader> reader, StreamPlan plan, const StreamTensor& lookup,
               const std::function<void()>& poll);
  ~WeightStream();
  WeightStream(const WeightStream&) = delete;
  WeightStream& operator=(const WeightStream&) = delete;

  // A chunk of rows begins its forward pass. poll is called every 20 ms of waiting and may throw;
  // it must live until the forward pass ends.
  void begin(Phase phase, const std::function<void()>* poll);

  // The pieces of a tensor, by number: [first, last), ascending rows; empty: it is in memory.
  struct Range {
    int32_t first = 0, last = 0;
  };
  Range pieces(int32_t tensor) const {
    const auto t = static_cast<size_t>(tensor);
    return t < ranges_.size() ? ranges_[t] : Range{};
  }
  const StreamPiece& piece(int32_t i) const { return plan_.pieces[static_cast<size_t>(i)]; }

  // The weights of a piece, rows one after the other; valid until release(). Null where they are
  // still being read and `wait` is false, or where others must be released first: not so for the
  // first one after release(), for which it waits. Throws Error(kDevice) where a read failed.
  const uint8_t* get(int32_t piece, bool wait);
  // What get() gave is done with: reads go on in its place.
  void release();

  // Gives up lent weights (stream_plan.h) of at least `bytes`, or all of them; their bytes. Takes
  // back such weights of at most `bytes`, which are read again; their bytes. Between chunks.
  int64_t lend(int64_t bytes);
  int64_t take_back(int64_t bytes);

  // Rows of the lookup matrix, at most kLookupRows of them; valid until the next call.
  static constexpr size_t kLookupRows = 32;
  std::span<const uint8_t* const> rows(std::span<const int32_t> numbers);
  // Memory of rows() for such a matrix.
  static int64_t lookup_bytes(const StreamTensor& lookup);

  const StreamPlan& plan() const { return plan_; }
  const FlashReader& reader() const { return *reader_; }
  // Since the load; for any thread.
  StreamCounters statistics() const;
  // Bytes a second of reading `bytes` of the streamed pieces, as many reads under way as the
  // reader takes, from a random one on.
  double flash_bandwidth(int64_t bytes, uint64_t seed);

 private:
  // A read in the ring, or on its way there.
  struct Passing {
    int32_t read = 0;
    uint8_t* data = nullptr;  // of its first page
    uint64_t taken = 0;       // bytes of the ring, what was skipped at its end included
    IoJob job;
  };

  const StreamRead& read(int32_t i) const { return plan_.reads[static_cast<size_t>(i)]; }
  // Where a piece lies in its read at `data`.
  const uint8_t* weights(int32_t piece, const uint8_t* data) const;
  int32_t streamed_after(int32_t read) const;
  // The streamed reads have changed: reads go on with the first one that is not in the ring.
  void restart();
  // Submits reads while the ring has room.
  void pump();
  // Ends the reads of the first `count` of ring_, or throws them away where they have not begun.
  void drop(size_t count);
  const std::function<void()>& poll() const { return poll_ ? *poll_ : none_; }
  void count(int64_t bytes, double stall_s);

  const std::shared_ptr<FlashReader> reader_;
  const StreamPlan plan_;
  const StreamTensor lookup_;
  HugeMemory kept_, arena_, lent_memory_;
  std::vector<Range> ranges_;      // by tensor
  std::vector<uint8_t*> pinned_;   // [reads], of the pinned ones, else null
  std::vector<int32_t> streamed_;  // streamed reads, ascending
  std::vector<uint8_t*> lent_at_;  // [plan's lent] where each is, or was
  size_t given_up_ = 0;            // of the plan's lent, from the first
  std::deque<Passing> ring_;       // in the order of use
  size_t given_ = 0;               // of it, from the first, up to the last that get() gave from
  int32_t last_given_ = -1;        // piece; -1: none since release()
  uint64_t given_bytes_ = 0;       // of the ring, since release()
  int32_t next_ = 0;               // read that comes next
  uint64_t head_ = 0, used_ = 0;   // where in the arena the next piece goes; bytes taken
  std::vector<const uint8_t*> rows_;
  HugeMemory row_memory_;
  bool decode_ = false;
  const std::function<void()>* poll_ = nullptr;
  const std::function<void()> none_;
  std::vector<IoJob*> jobs_;
  std::atomic<int64_t> bytes_{0}, decode_bytes_{0};
  std::atomic<double> stall_s_{0}, decode_stall_s_{0};
};

}  // namespace stoker
