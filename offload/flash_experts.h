// Experts on flash, some of them in the cache: hits are given at once, misses in order of arrival,
// and what the predictor expects is read meanwhile.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "offload/pools/cache.h"
#include "offload/controller.h"
#include "offload/units/expert_store.h"
#include "offload/flash_reader.h"
#include "offload/statistics.h"
#include "offload/predict/predictor.h"
#include "offload/predict/token_history.h"

namespace stoker {

// One acquired expert, for traces.
struct Access {
  int32_t evaluation = 0;  // chunks since the trace began
  Phase phase = Phase::kPrompt;
  int32_t tokens = 0;      // of the chunk
  int32_t token = 0;       // of the chunk
  int64_t sequence = 0;    // of the token
  int32_t id = 0;          // of the token in the vocabulary
  int16_t layer = 0;
  int16_t rank = 0;  // 0: the router's first choice
  int32_t expert = 0;
  float weight = 0;
  int8_t source = 0;  // 0 miss, 1 hit, 2 late
  float wait_us = 0;  // from acquire() until it was ready
};

class FlashExperts : public ExpertStore {
 public:
  struct Options {
    std::vector<int64_t> slots;  // of each size class
    std::string policy{kDefaultPolicy};
    std::string predictor{kDefaultPredictor};
    std::string predictor_state;  // what it has learnt before; empty: nothing
    PrefetchMode prefetch = PrefetchMode::kAuto;
    bool overlap = true;  // false: a layer waits for all its reads before it computes
  };

  // The reader's files are the layout's shards.
  FlashExperts(Layout layout, std::shared_ptr<FlashReader> reader, const PredictorShape& shape,
               const Options& options);
  ~FlashExperts() override;

  void begin(const Step& step, const std::function<void()>* poll) override;
  void end() override;
  void prefetch_certain(int64_t layer, const Routes& routes) override;
  std::unique_ptr<ExpertLease> acquire(int64_t layer, std::span<const int32_t> experts,
                                       const Routes& routes) override;
  void look_ahead(int64_t layer, RouterProbe& ahead) override;

  const Layout& layout() const { return layout_; }
  const Cache& cache() const { return cache_; }
  const FlashReader& reader() const { return *reader_; }
  // Since the load, as it was between two chunks; for any thread.
  StoreStatistics statistics() const;
  // The same, now; under the pool's lease.
  const StoreCounters& counters() const { return statistics_; }
  // How prefetch goes, for people; for any thread.
  std::string prefetch_description() const;
  // Sequences' `bytes` come out of the cache (0: it would be too small to work), and go back to it.
  // Their bytes. Between chunks.
  int64_t lend(int64_t bytes);
  int64_t take_back(int64_t bytes) { return cache_.take_back(bytes); }
  Predictor* predictor() { return predictor_.get(); }

  void record(bool on);              // tracing
  std::vector<Access> take_trace();  // what was recorded since the last call
  // Bytes a second of reading randomly chosen units, about `bytes` of them, with as many reads
  // under way as the reader takes.
  double flash_bandwidth(int64_t bytes, uint64_t seed);
  void forget();  // empties the cache: for measurements from cold

 private:
  friend class FlashLease;
  using Slot = Cache::Slot;
  // A unit that may be prefetched.
  struct Candidate {
    UnitId unit;
    int64_t visit;  // of the layer it is for
    float probability;
    bool certain = false;  // it will be used: it waits for a slot where a guess is given up
  };

  int64_t visit(int64_t layer) const { return pass_ * layout_.n_layer() + layer; }
  void submit(Slot& slot, bool demand);
  // Books the reads that have ended; land(): one of them.
  void reap();
  void land(size_t read_index);
  void land(const Slot& slot);
  // Cancels prefetches whose layer has come without them.
  void cancel_stale();
  // Cancels the latest prefetch that has not begun, for its slot. False where there is none.
  bool cancel_one();
  void land_cancelled(size_t read_index);
  void publish();
  void add_candidate(const Candidate& candidate);
  // Queues certain prefetches, as many layers ahead as there is room for in the cache.
  void queue_certain();
  void sort_candidates();
  // Submits candidates while there is room.
  void pump();

  Layout layout_;
  TokenHistory history_;
  Cache cache_;
  std::unique_ptr<Predictor> predictor_;
  Controller controller_;
  const bool overlap_;
  const int64_t used_;  // experts of a layer that one token uses
  int64_t pass_ = 0;    // chunks so far
  Step step_;           // this chunk
  int64_t layer_ = -1;  // acquired last
  const std::function<void()>* poll_ = nullptr;
  struct ReadInFlight {
    Slot* slot;
    int64_t visit;  // that a prefetch is for
    bool demand;
  };
  std::vector<ReadInFlight> reads_;
  std::vector<Candidate> candidates_;  // by visit, then the likeliest first
  std::vector<Candidate> certain_;     // of later layers, by visit
  size_t certain_queued_ = 0;  // of them, from the first: those that are candidates or in the cache
  std::vector<Guess> guesses_;
  std::vector<UnitId> units_;
  std::vector<uint8_t> resident_;
  std::vector<float> probabilities_;
  StoreStatistics statistics_;
  mutable std::mutex published_mutex_;
  StoreStatistics published_;
  std::string published_description_;
  bool recording_ = false;
  std::vector<Access> trace_;
  const std::shared_ptr<FlashReader> reader_;
};

}  // namespace stoker
