// FlashExperts keeps some experts in a cache and reads the others from flash: it gives hits at once
// and misses in order of arrival, and meanwhile reads what the predictor expects.
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
  int32_t tokens = 0;    // tokens of the chunk
  int32_t token = 0;     // index of the token in the chunk
  int64_t sequence = 0;  // id of the token's sequence
  int32_t id = 0;        // id of the token in the vocabulary
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
    std::vector<int64_t> slots;  // slots of each size class
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
  // Returns the counts as of the end of the last chunk. Any thread may call it.
  StoreStatistics statistics() const;
  // Returns the counts of this moment. Called under the pool's lease.
  const StoreCounters& counters() const { return statistics_; }
  // Returns how prefetch is doing, for people. Any thread may call it.
  std::string prefetch_description() const;
  // Takes `bytes` out of the cache for the pages of sequences, or gives them back. Returns how many
  // bytes it was: 0 where the cache would become too small to work. Called between chunks.
  int64_t lend(int64_t bytes);
  int64_t take_back(int64_t bytes) { return cache_.take_back(bytes); }
  Predictor* predictor() { return predictor_.get(); }

  void record(bool on);              // switches tracing on or off
  std::vector<Access> take_trace();  // returns what was recorded since the last call
  // Measures the bandwidth, bytes a second, of reading about `bytes` of randomly chosen units, with
  // as many reads in flight as the reader takes.
  double flash_bandwidth(int64_t bytes, uint64_t seed);
  void forget();  // empties the cache, for measurements from cold

 private:
  friend class FlashLease;
  using Slot = Cache::Slot;
  // A unit that may be prefetched.
  struct Candidate {
    UnitId unit;
    int64_t visit;  // of the layer it is for
    float probability;
    bool certain = false;  // It will be used: it waits for a slot where a guess is given up
  };

  int64_t visit(int64_t layer) const { return pass_ * layout_.n_layer() + layer; }
  void submit(Slot& slot, bool demand);
  // reap() records the reads that have ended; land() records one of them.
  void reap();
  void land(size_t read_index);
  void land(const Slot& slot);
  // Cancels prefetches whose layer has come without them.
  void cancel_stale();
  // Cancels the latest prefetch that has not begun, to free its slot. Returns false if there is
  // none.
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
  int64_t layer_ = -1;  // the layer acquired last
  const std::function<void()>* poll_ = nullptr;
  struct ReadInFlight {
    Slot* slot;
    int64_t visit;  // the visit that a prefetch is for
    bool demand;
  };
  std::vector<ReadInFlight> reads_;
  std::vector<Candidate> candidates_;  // by visit, then by falling probability
  std::vector<Candidate> certain_;     // certain prefetches of later layers, by visit
  size_t certain_queued_ = 0;  // how many of them, from the first, are candidates or in the cache
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
