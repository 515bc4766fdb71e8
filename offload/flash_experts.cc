#include "offload/flash_experts.h"

#include <algorithm>
#include <chrono>
#include <random>
#include <utility>

#include "runtime/base/errors.h"

namespace stoker {

namespace {

// The most reads in flight at once, guesses included: enough to keep the disk busy until the next
// look, and no more, because a later guess is a better one.
constexpr int64_t kDecodeReads = 3;
constexpr int64_t kPromptReads = 64;
// A certain prefetch cannot turn out wrong: the disk gets so many reads that it always has the next
// one.
constexpr int64_t kCertainReads = 8;
// The least probability of a guess that is read into an empty slot.
constexpr float kFillThreshold = 0.2f;

double now() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

}  // namespace

class FlashLease : public ExpertLease {
 public:
  FlashLease(FlashExperts& store, int64_t layer, std::span<const int32_t> experts,
             const Routes& routes)
      : store_(store), layer_(layer), experts_(experts.begin(), experts.end()), routes_(routes) {
    slots_.resize(experts_.size());
    views_.resize(experts_.size());
    source_.assign(experts_.size(), 0);
    wait_.assign(experts_.size(), 0);
    began_ = now();
    StoreStatistics& s = store_.statistics_;
    int64_t hits = 0, late = 0;
    for (size_t i = 0; i < experts_.size(); ++i) {
      const int32_t index = static_cast<int32_t>(i);
      FlashExperts::Slot* slot = store_.cache_.find(unit(i));
      // The status is loaded once, because a prefetch may end, and fail, at any moment.
      const IoStatus status =
          slot ? slot->job.status.load(std::memory_order_acquire) : IoStatus::kIdle;
      if (status == IoStatus::kFailed) {
        store_.land(*slot);
        slot = nullptr;
      }
      if (!slot) {
        missing_.push_back(index);
        continue;
      }
      ++slot->pins;
      slots_[i] = slot;
      if (status == IoStatus::kPending) {
        store_.reader_->io().promote(slot->job);
        waiting_.push_back(index);
        source_[i] = 2;
        ++late;
      } else {
        give_.push_back(index);
        source_[i] = 1;
        ++hits;
      }
      if (slot->prefetched) ++s.prefetches_used;
      slot->prefetched = false;
    }
    const int64_t misses = static_cast<int64_t>(missing_.size());
    s.hits += hits;
    s.late += late;
    s.misses += misses;
    if (!store_.step_.is_prompt()) {
      s.decode_hits += hits;
      s.decode_late += late;
      s.decode_misses += misses;
    }
    s.layer_uses[static_cast<size_t>(layer)] += static_cast<int64_t>(experts_.size());
    s.layer_hits[static_cast<size_t>(layer)] += hits;
    store_.cancel_stale();
    request_missing();
  }

  ~FlashLease() override {
    for (FlashExperts::Slot* slot : slots_) {
      if (slot) --slot->pins;
    }
    if (store_.recording_) record();
  }

  std::span<const int32_t> next_ready() override {
    for (int32_t i : given_) {
      FlashExperts::Slot*& slot = slots_[static_cast<size_t>(i)];
      --slot->pins;
      slot = nullptr;
    }
    given_.clear();
    request_missing();
    collect();
    const auto stalled = [&] {
      if (waiting_.empty() && missing_next_ >= missing_.size()) return false;
      return give_.empty() || (!store_.overlap_ && !waiting_.empty());
    };
    if (stalled()) {
      const double began = now();
      for (;;) {
        const uint32_t seen = store_.reader_->ended();
        request_missing();
        collect();
        if (!stalled()) break;
        store_.reader_->wait(seen);
        if (store_.poll_ && *store_.poll_) (*store_.poll_)();
      }
      const double stall = now() - began;
      store_.statistics_.stall_s += stall;
      if (!store_.step_.is_prompt()) store_.statistics_.decode_stall_s += stall;
    }
    std::swap(give_, given_);
    for (int32_t i : given_) {
      const size_t k = static_cast<size_t>(i);
      views_[k] = store_.layout_.view(unit(k), slots_[k]->data);
    }
    return given_;
  }

  const Expert& expert(int32_t index) const override { return views_[static_cast<size_t>(index)]; }

 private:
  UnitId unit(size_t index) const { return store_.layout_.unit(layer_, experts_[index]); }

  // Submits reads of missing experts while there are slots; then there may be room for guesses.
  void request_missing() {
    while (missing_next_ < missing_.size()) {
      const int32_t index = missing_[missing_next_];
      const UnitId u = unit(static_cast<size_t>(index));
      FlashExperts::Slot* slot = store_.cache_.take(u, store_.visit(layer_), true);
      if (!slot) {
        if (store_.cancel_one()) continue;
        return;
      }
      ++missing_next_;
      store_.submit(*slot, true);
      ++slot->pins;
      slots_[static_cast<size_t>(index)] = slot;
      waiting_.push_back(index);
    }
    store_.pump();
  }

  // Moves the experts that have arrived from waiting_ to give_.
  void collect() {
    store_.reap();
    for (size_t i = 0; i < waiting_.size();) {
      const size_t k = static_cast<size_t>(waiting_[i]);
      FlashExperts::Slot& slot = *slots_[k];
      switch (slot.job.status.load(std::memory_order_acquire)) {
        case IoStatus::kPending:
          ++i;
          continue;
        case IoStatus::kDone:
          wait_[k] = static_cast<float>(1e6 * std::max(0.0, slot.job.done_s - began_));
          give_.push_back(waiting_[i]);
          waiting_[i] = waiting_.back();
          waiting_.pop_back();
          continue;
        default:
          throw_failed(slot.job);
      }
    }
  }

  void record() {
    const size_t tokens = static_cast<size_t>(store_.step_.size());
    const size_t used = routes_.expert.size() / tokens;
    for (size_t p = 0; p < routes_.expert.size(); ++p) {
      const int32_t e = routes_.expert[p];
      const StepRow& row = store_.step_.rows[p / used];
      const auto at = std::lower_bound(experts_.begin(), experts_.end(), e) - experts_.begin();
      store_.trace_.push_back({static_cast<int32_t>(store_.pass_), store_.step_.phase,
                               static_cast<int32_t>(tokens), static_cast<int32_t>(p / used),
                               row.sequence, row.token, static_cast<int16_t>(layer_),
                               static_cast<int16_t>(p % used), e, routes_.weight[p],
                               source_[static_cast<size_t>(at)], wait_[static_cast<size_t>(at)]});
    }
  }

  FlashExperts& store_;
  const int64_t layer_;
  std::vector<int32_t> experts_;
  const Routes& routes_;
  double began_ = 0;
  std::vector<FlashExperts::Slot*> slots_;  // [experts], null: this lease does not pin it
  std::vector<Expert> views_;               // [experts]
  std::vector<int8_t> source_;
  std::vector<float> wait_;
  std::vector<int32_t> missing_, waiting_, give_, given_;  // indices into experts_
  size_t missing_next_ = 0;
};

FlashExperts::FlashExperts(Layout layout, std::shared_ptr<FlashReader> reader,
                           const PredictorShape& shape, const Options& options)
    : layout_(std::move(layout)),
      history_(layout_.n_layer(), shape.n_expert_used),
      cache_(layout_, options.slots,
             make_policy(options.policy,
                         {layout_.n_layer(), layout_.n_expert(), shape.n_expert_used})),
      predictor_(make_predictor(options.predictor, shape)),
      controller_(shape, predictor_ ? options.prefetch : PrefetchMode::kOff),
      overlap_(options.overlap),
      used_(shape.n_expert_used),
      reader_(std::move(reader)) {
  statistics_.layer_uses.assign(static_cast<size_t>(layout_.n_layer()), 0);
  statistics_.layer_hits.assign(static_cast<size_t>(layout_.n_layer()), 0);
  cache_.policy().follow(&history_);
  if (predictor_) {
    predictor_->follow(&history_);
    predictor_->set_state(options.predictor_state);
  } else if (!options.predictor_state.empty()) {
    throw Error(ErrorKind::kOption, "predictor none: expected no profile");
  }
  publish();
}

FlashExperts::~FlashExperts() {
  // The reads must end before their slots are freed.
  std::vector<IoJob*> jobs;
  for (const ReadInFlight& f : reads_) jobs.push_back(&f.slot->job);
  reader_->end(jobs);
}

void FlashExperts::begin(const Step& step, const std::function<void()>* poll) {
  ++pass_;
  step_ = step;
  layer_ = -1;
  poll_ = poll;
  reap();
  history_.begin(step);
  cache_.policy().foresee();
  certain_.clear();
  certain_queued_ = 0;
  if (history_.as_foretold()) {
    std::erase_if(candidates_,
                  // Left by an interrupted forward pass.
                  [](const Candidate& w) { return w.certain; });
  } else {
    candidates_.clear();
  }
  publish();  // the counts of a forward pass that was interrupted
  controller_.begin(step, now(), reader_->io().statistics().busy_s);
  if (predictor_) predictor_->begin(step);
}

void FlashExperts::end() {
  step_.rows = {};
  controller_.end(now(), reader_->io().statistics().busy_s);
  publish();
}

void FlashExperts::prefetch_certain(int64_t layer, const Routes& routes) {
  if (!predictor_ || !controller_.predicts()) return;  // demand only
  reap();
  units_.clear();
  for (int32_t e : routes.expert) units_.push_back(layout_.unit(layer, e));
  std::sort(units_.begin(), units_.end());
  units_.erase(std::unique(units_.begin(), units_.end()), units_.end());
  for (UnitId unit : units_) certain_.push_back({unit, visit(layer), 1.0f, true});
  std::stable_sort(certain_.begin() + static_cast<int64_t>(certain_queued_), certain_.end(),
                   [](const Candidate& a, const Candidate& b) { return a.visit < b.visit; });
  queue_certain();
  pump();
}

void FlashExperts::queue_certain() {
  if (certain_queued_ == certain_.size()) return;
  // A prefetched expert stays in its slot until its layer comes. Some slots are left to the layer
  // that computes and to the policy; the next layer always gets its candidates.
  std::vector<int64_t> room(layout_.class_units().size());
  for (size_t c = 0; c < room.size(); ++c) {
    room[c] = cache_.n_slots(static_cast<int>(c)) - 2 * used_;
  }
  const auto later = std::find_if(certain_.begin(), certain_.end(),
                                  [&](const Candidate& w) { return w.visit > visit(layer_); });
  const int64_t next_layer = later == certain_.end() ? 0 : later->visit;
  const size_t before = certain_queued_;
  for (size_t i = 0; i < certain_.size(); ++i) {
    const Candidate& next = certain_[i];
    int64_t& left = room[static_cast<size_t>(layout_.size_class(next.unit))];
    --left;
    if (i < certain_queued_) continue;
    if (left < 0 && next.visit > next_layer) break;
    add_candidate(next);
    ++certain_queued_;
  }
  if (certain_queued_ > before) sort_candidates();
}

std::unique_ptr<ExpertLease> FlashExperts::acquire(int64_t layer, std::span<const int32_t> experts,
                                                   const Routes& routes) {
  layer_ = layer;
  reap();
  Policy& policy = cache_.policy();
  policy.begin_layer(layer, step_.size(), step_.is_single());
  const size_t rows = static_cast<size_t>(step_.size());
  const size_t used = routes.expert.size() / rows;
  units_.resize(used);
  for (size_t t = 0; t < rows; ++t) {
    for (size_t j = 0; j < used; ++j) units_[j] = layout_.unit(layer, routes.expert[t * used + j]);
    policy.use(units_, std::span(routes.weight).subspan(t * used, used));
  }
  history_.take(layer, routes);
  controller_.judge(layer, experts);
  if (predictor_) predictor_->observe(layer, routes);
  // Candidates for this layer are obsolete now; the others wait until this layer's misses are being
  // read.
  const auto past = [&](const Candidate& w) { return w.visit <= visit(layer); };
  std::erase_if(candidates_, past);
  const auto queued = certain_.begin() + static_cast<int64_t>(certain_queued_);
  certain_queued_ -= static_cast<size_t>(std::count_if(certain_.begin(), queued, past));
  std::erase_if(certain_, past);
  queue_certain();
  return std::make_unique<FlashLease>(*this, layer, experts, routes);
}

void FlashExperts::look_ahead(int64_t layer, RouterProbe& ahead) {
  if (!predictor_ || !controller_.predicts()) return;
  const size_t n =
      predictor_->predict(layer, controller_.distance(), controller_.width(), ahead, guesses_);
  for (size_t g = 0; g < n; ++g) {
    const Guess& guess = guesses_[g];
    units_.resize(guess.experts.size());
    resident_.resize(guess.experts.size());
    for (size_t i = 0; i < units_.size(); ++i) {
      units_[i] = layout_.unit(guess.layer % layout_.n_layer(), guess.experts[i]);
      resident_[i] = cache_.find(units_[i]) != nullptr;
    }
    controller_.guessed(layer, guess, resident_, &probabilities_);
    if (!controller_.prefetches()) continue;
    // Every expert in a guess for a prompt was chosen by some token.
    const float threshold = step_.is_prompt() ? 0 : controller_.threshold();
    for (size_t i = 0; i < units_.size(); ++i) {
      // While the cache fills, an idle disk can fetch what is likely to be used at some later time.
      if (probabilities_[i] < (cache_.has_free(units_[i]) ? kFillThreshold : threshold)) continue;
      add_candidate({units_[i], visit(guess.layer), probabilities_[i]});
    }
  }
  sort_candidates();
  pump();
}

void FlashExperts::add_candidate(const Candidate& candidate) {
  if (Slot* slot = cache_.find(candidate.unit)) {
    slot->keep = std::max(slot->keep, candidate.visit);
  } else {
    candidates_.push_back(candidate);
  }
}

void FlashExperts::sort_candidates() {
  std::stable_sort(candidates_.begin(), candidates_.end(),
                   [](const Candidate& a, const Candidate& b) {
                     return a.visit != b.visit ? a.visit < b.visit : a.probability > b.probability;
                   });
}

void FlashExperts::publish() {
  statistics_.evictions = cache_.evictions();
  const std::lock_guard lock(published_mutex_);
  published_ = statistics_;
  published_description_ = controller_.description();
}

StoreStatistics FlashExperts::statistics() const {
  const std::lock_guard lock(published_mutex_);
  return published_;
}

std::string FlashExperts::prefetch_description() const {
  const std::lock_guard lock(published_mutex_);
  return published_description_;
}

int64_t FlashExperts::lend(int64_t bytes) {
  reap();
  std::vector<int64_t> least;
  for (int64_t units : layout_.class_units()) least.push_back(ring_slots(units, used_));
  return cache_.lend(bytes, least);
}

void FlashExperts::submit(Slot& slot, bool demand) {
  layout_.prepare(slot.unit, slot.data, slot.job);
  ++slot.pins;
  slot.prefetched = !demand;
  reader_->io().submit(slot.job, demand);
  reads_.push_back({&slot, visit(layer_), demand});
}

void FlashExperts::reap() {
  for (size_t i = 0; i < reads_.size();) {
    const IoJob& job = reads_[i].slot->job;
    if (job.status.load(std::memory_order_acquire) == IoStatus::kPending) {
      ++i;
    } else {
      land(i);
    }
  }
}

void FlashExperts::land(size_t read_index) {
  const ReadInFlight f = reads_[read_index];
  Slot& slot = *f.slot;
  --slot.pins;
  if (slot.job.status.load(std::memory_order_acquire) == IoStatus::kDone) {
    const int64_t bytes = layout_.read_bytes(slot.unit);
    if (f.demand) controller_.read_took(slot.job.done_s - slot.job.submitted_s);
    (f.demand ? statistics_.demand_bytes : statistics_.prefetch_bytes) += bytes;
    if (!step_.is_prompt()) statistics_.decode_bytes += bytes;
  } else {
    cache_.drop(slot);
  }
  reads_[read_index] = reads_.back();
  reads_.pop_back();
}

void FlashExperts::land(const Slot& slot) {
  for (size_t i = 0; i < reads_.size(); ++i) {
    if (reads_[i].slot == &slot) return land(i);
  }
}

void FlashExperts::land_cancelled(size_t read_index) {
  Slot& slot = *reads_[read_index].slot;
  ++statistics_.cancelled;
  --slot.pins;
  cache_.drop(slot);
  reads_[read_index] = reads_.back();
  reads_.pop_back();
}

void FlashExperts::cancel_stale() {
  for (size_t i = 0; i < reads_.size();) {
    const ReadInFlight& f = reads_[i];
    const bool wanted = f.demand || f.slot->pins > 1 || f.visit > visit(layer_);
    if (!wanted && reader_->io().cancel(f.slot->job)) {
      land_cancelled(i);
    } else {
      ++i;
    }
  }
}

bool FlashExperts::cancel_one() {
  for (size_t i = reads_.size(); i-- > 0;) {
    const ReadInFlight& f = reads_[i];
    if (f.demand || f.slot->pins > 1 || !reader_->io().cancel(f.slot->job)) continue;
    land_cancelled(i);
    return true;
  }
  return false;
}

void FlashExperts::pump() {
  if (candidates_.empty()) return;
  const int64_t most = cache_.n_slots() / 3;
  const int64_t guesses =
      std::min(step_.is_prompt() ? kPromptReads : kDecodeReads * step_.size(), most);
  const int64_t certain = std::min(std::max(kCertainReads, guesses), most);
  size_t granted = 0, waiting = 0;
  while (granted < candidates_.size()) {
    const Candidate w = candidates_[granted];
    if (static_cast<int64_t>(reads_.size()) >= (w.certain ? certain : guesses)) break;
    ++granted;
    if (Slot* there = cache_.find(w.unit)) {
      there->keep = std::max(there->keep, w.visit);
      continue;
    }
    Slot* slot = cache_.take(w.unit, visit(layer_), false);
    if (!slot) {
      if (w.certain) candidates_[waiting++] = w;
      continue;
    }
    slot->keep = w.visit;
    submit(*slot, false);
    reads_.back().visit = w.visit;
    ++statistics_.prefetches;
  }
  candidates_.erase(candidates_.begin() + static_cast<int64_t>(waiting),
                    candidates_.begin() + static_cast<int64_t>(granted));
}

void FlashExperts::record(bool on) {
  recording_ = on;
  if (!on) trace_.clear();
}

std::vector<Access> FlashExperts::take_trace() { return std::exchange(trace_, {}); }

double FlashExperts::flash_bandwidth(int64_t bytes, uint64_t seed) {
  constexpr size_t kBuffers = 8;
  const uint64_t room = static_cast<uint64_t>(layout_.class_bytes().back());
  const HugeMemory memory(kBuffers * room, "the measurement of the disk");
  std::vector<UnitId> units;
  for (UnitId u = 0; u < static_cast<UnitId>(layout_.n_units()); ++u) {
    if (layout_.has(u)) units.push_back(u);
  }
  std::mt19937_64 random(seed);
  std::vector<FlashReader::Piece> pieces;
  int64_t total = 0;
  IoJob job;
  for (size_t i = 0; total < bytes; ++i) {
    // Nobody looks at the bytes, so the buffers may be shared.
    uint8_t* into = memory.data() + i % kBuffers * room;
    layout_.prepare(units[random() % units.size()], into, job);
    for (int r = 0; r < job.n_reads; ++r) {
      const Read& read = job.reads[static_cast<size_t>(r)];
      pieces.push_back({{read.file, read.offset, read.needed}, read.into});
      total += static_cast<int64_t>(read.bytes);
    }
  }
  reader_->read_all({pieces.data(), std::min<size_t>(pieces.size(), kBuffers)}, {});  // first touch
  const double began = now();
  reader_->read_all(pieces, {});
  return static_cast<double>(total) / (now() - began);
}

void FlashExperts::forget() {
  reap();
  for (Slot& slot : cache_.slots()) {
    if (slot.unit >= 0 && slot.pins == 0) cache_.drop(slot);
  }
}

}  // namespace stoker
