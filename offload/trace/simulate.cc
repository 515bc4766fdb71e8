#include "offload/trace/simulate.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <string>
#include <utility>

#include "offload/predict/predictor.h"
#include "offload/predict/token_history.h"
#include "runtime/base/errors.h"

namespace stoker {

namespace {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

[[noreturn]] void bad(const std::string& message) {
  throw Error(ErrorKind::kOption, "simulate: " + message);
}

void check(const RoutingTrace& trace, int64_t slots) {
  const PolicyShape& shape = trace.shape;
  const size_t visits = trace.layer.size();
  if (slots < 1) bad("expected at least one slot, found " + std::to_string(slots));
  if (shape.n_layer < 1 || shape.n_expert < 1 || shape.n_expert_used < 1 ||
      shape.n_expert > std::numeric_limits<UnitId>::max() / shape.n_layer) {
    bad("expected a positive number of layers and experts, found " + std::to_string(shape.n_layer) +
        " and " + std::to_string(shape.n_expert));
  }
  if (trace.evaluation.size() != visits || trace.offset.size() != visits + 1 ||
      trace.weight.size() != trace.expert.size() || trace.offset[0] != 0 ||
      (!trace.token.empty() && trace.token.size() != visits) || trace.decode.size() != visits ||
      (!trace.sequence.empty() && trace.sequence.size() != visits) ||
      trace.offset[visits] != static_cast<int64_t>(trace.expert.size())) {
    bad("arrays of unequal length");
  }
  std::vector<size_t> seen(static_cast<size_t>(shape.n_expert), 0);
  for (size_t v = 0; v < visits; ++v) {
    const std::string where = "visit " + std::to_string(v) + ": ";
    if (trace.layer[v] < 0 || trace.layer[v] >= shape.n_layer) {
      bad(where + "expected a layer below " + std::to_string(shape.n_layer) + ", found " +
          std::to_string(trace.layer[v]));
    }
    if (v > 0 &&
        (trace.evaluation[v] < trace.evaluation[v - 1] ||
         (trace.evaluation[v] == trace.evaluation[v - 1] &&
          (trace.layer[v] < trace.layer[v - 1] || trace.decode[v] != trace.decode[v - 1])))) {
      bad(where + "evaluations or layers descend, or one is prompt and decode");
    }
    if (trace.offset[v + 1] < trace.offset[v] ||
        trace.offset[v + 1] > static_cast<int64_t>(trace.expert.size())) {
      bad(where + "offsets descend");
    }
    for (int64_t i = trace.offset[v]; i < trace.offset[v + 1]; ++i) {
      const int32_t expert = trace.expert[static_cast<size_t>(i)];
      if (expert < 0 || expert >= shape.n_expert) {
        bad(where + "expected an expert below " + std::to_string(shape.n_expert) + ", found " +
            std::to_string(expert));
      }
      if (std::exchange(seen[static_cast<size_t>(expert)], v + 1) == v + 1) {
        bad(where + "expert " + std::to_string(expert) + " twice");
      }
    }
  }
}

// The visits of one evaluation at one layer, and the distinct units that they ask for.
struct Chunk {
  size_t begin = 0, end = 0;            // visits
  size_t first_unit = 0, end_unit = 0;  // in Chunks::unit
};

struct Chunks {
  std::vector<Chunk> chunk;
  std::vector<UnitId> unit;       // of each chunk, in order of first use
  std::vector<int64_t> next_use;  // the next chunk that asks for this unit, or kNever
};

Chunks chunks_of(const RoutingTrace& trace) {
  const auto n_expert = static_cast<UnitId>(trace.shape.n_expert);
  Chunks chunks;
  std::vector<int64_t> last(static_cast<size_t>(trace.shape.n_layer * trace.shape.n_expert), -1);
  for (size_t v = 0; v < trace.layer.size();) {
    Chunk chunk{.begin = v, .first_unit = chunks.unit.size()};
    const auto number = static_cast<int64_t>(chunks.chunk.size());
    for (; v < trace.layer.size() && trace.evaluation[v] == trace.evaluation[chunk.begin] &&
           trace.layer[v] == trace.layer[chunk.begin];
         ++v) {
      for (int64_t i = trace.offset[v]; i < trace.offset[v + 1]; ++i) {
        const UnitId unit = trace.layer[v] * n_expert + trace.expert[static_cast<size_t>(i)];
        if (std::exchange(last[static_cast<size_t>(unit)], number) != number) {
          chunks.unit.push_back(unit);
        }
      }
    }
    chunk.end = v;
    chunk.end_unit = chunks.unit.size();
    chunks.chunk.push_back(chunk);
  }
  std::fill(last.begin(), last.end(), kNever);
  chunks.next_use.resize(chunks.unit.size());
  for (size_t c = chunks.chunk.size(); c-- > 0;) {
    for (size_t i = chunks.chunk[c].first_unit; i < chunks.chunk[c].end_unit; ++i) {
      chunks.next_use[i] =
          std::exchange(last[static_cast<size_t>(chunks.unit[i])], static_cast<int64_t>(c));
    }
  }
  return chunks;
}

// Belady's MIN: evicts the unit whose next use lies furthest ahead. It is told of the next uses
// chunk by chunk.
class Belady : public Policy {
 public:
  explicit Belady(const PolicyShape& shape)
      : next_(static_cast<size_t>(shape.n_layer * shape.n_expert), kNever) {}

  void use(std::span<const UnitId>, std::span<const float>) override {}

  void foresee(std::span<const UnitId> units, std::span<const int64_t> next_use) {
    for (size_t i = 0; i < units.size(); ++i) next_[static_cast<size_t>(units[i])] = next_use[i];
  }

  size_t victim(std::span<const UnitId> candidates) override {
    const auto furthest =
        std::max_element(candidates.begin(), candidates.end(), [&](UnitId a, UnitId b) {
          return next_[static_cast<size_t>(a)] < next_[static_cast<size_t>(b)];
        });
    return static_cast<size_t>(furthest - candidates.begin());
  }

 private:
  std::vector<int64_t> next_;  // [n_layer * n_expert]: number of the chunk
};

// The set of units that have a slot.
class Slots {
 public:
  Slots(int64_t slots, int64_t units)
      : slots_(static_cast<size_t>(slots)), needed_(static_cast<size_t>(units), 0) {
    resident_flag_.assign(static_cast<size_t>(units), 0);
  }

  bool resident(UnitId unit) const { return resident_flag_[static_cast<size_t>(unit)] != 0; }

  // Begins a chunk, whose units are not candidates for eviction.
  void need(std::span<const UnitId> units) {
    ++chunk_;
    for (const UnitId unit : units) needed_[static_cast<size_t>(unit)] = chunk_;
    candidates_stale_ = true;
  }

  void load(UnitId unit, Policy& policy) {
    if (resident_.size() >= slots_) {
      if (std::exchange(candidates_stale_, false)) {
        candidates_.clear();
        for (const UnitId other : resident_) {
          if (needed_[static_cast<size_t>(other)] != chunk_) candidates_.push_back(other);
        }
      }
      // If the chunk needs more units than there are slots, it is loaded in waves, and any unit of
      // a wave that is done may leave.
      if (candidates_.empty()) candidates_ = resident_;
      const size_t index = policy.victim(candidates_);
      if (index >= candidates_.size()) bad("a policy chose no candidate");
      const UnitId leaver = candidates_[index];
      candidates_[index] = candidates_.back();
      candidates_.pop_back();
      policy.erase(leaver);
      resident_flag_[static_cast<size_t>(leaver)] = 0;
      *std::find(resident_.begin(), resident_.end(), leaver) = unit;
    } else {
      resident_.push_back(unit);
    }
    resident_flag_[static_cast<size_t>(unit)] = 1;
    policy.insert(unit);
  }

 private:
  size_t slots_;
  std::vector<UnitId> resident_;        // [<= slots]
  std::vector<uint8_t> resident_flag_;  // [units]
  std::vector<uint64_t> needed_;        // [units]: the last chunk that needed it
  std::vector<UnitId> candidates_;
  bool candidates_stale_ = true;
  uint64_t chunk_ = 0;
};

// A predictor that is told of the forward pass, together with what it has named for each layer.
class Foresight : RouterProbe {
 public:
  Foresight(std::string_view name, const PolicyShape& shape, const TokenHistory* history)
      : n_expert_(shape.n_expert),
        used_(static_cast<size_t>(shape.n_expert_used)),
        remembers_(name == "history"),
        named_(static_cast<size_t>(shape.n_layer)) {
    if (std::find(std::begin(kReplayed), std::end(kReplayed), name) == std::end(kReplayed)) {
      bad("predictor " + std::string(name) + ": expected one that needs no hidden states");
    }
    const auto layers = static_cast<size_t>(shape.n_layer);
    predictor_ = make_predictor(name, {shape.n_layer, 0, shape.n_expert, shape.n_expert_used,
                                       std::vector<bool>(layers, true)});
    predictor_->follow(history);
    predictor_->set_state({});
  }

  void begin(const Step& step) {
    single_ = step.is_single();
    for (auto& experts : named_) experts.clear();
    predictor_->begin(step);
    if (single_) guess(-1);
  }
  void take(int64_t layer, const Routes& routes) {
    if (!single_ || routes.expert.size() != used_) return;
    predictor_->observe(layer, routes);
    guess(layer);
  }
  std::span<const int32_t> named(size_t layer) const { return named_[layer]; }

 private:
  // The routers have no hidden states here, and guesses made from them are not used.
  void logits(int64_t, float* out) override { std::fill_n(out, n_expert_, 0.0f); }
  const float* hidden() const override { return nullptr; }

  void guess(int64_t layer) {
    const size_t n = predictor_->predict(layer, 1, static_cast<int64_t>(used_), *this, guesses_);
    for (size_t g = 0; g < n; ++g) {
      const Guess& guess = guesses_[g];
      if (guess.remembered != remembers_) continue;
      if (static_cast<size_t>(guess.layer) >= named_.size()) continue;  // of the next token
      const size_t most = std::min(guess.experts.size(), used_);
      named_[static_cast<size_t>(guess.layer)].assign(
          guess.experts.begin(), guess.experts.begin() + static_cast<int64_t>(most));
    }
  }

  const int64_t n_expert_;
  const size_t used_;
  const bool remembers_;
  bool single_ = false;
  std::unique_ptr<Predictor> predictor_;
  std::vector<std::vector<int32_t>> named_;  // [n_layer]
  std::vector<Guess> guesses_;
};

}  // namespace

Replay replay(const RoutingTrace& trace, std::string_view policy_name, int64_t slots,
              int64_t count_from, std::string_view predictor) {
  check(trace, slots);
  const PolicyShape& shape = trace.shape;
  const bool clairvoyant = policy_name == "belady";
  std::unique_ptr<Policy> policy;
  Belady* belady = nullptr;
  if (clairvoyant) {
    auto owned = std::make_unique<Belady>(shape);
    belady = owned.get();
    policy = std::move(owned);
  } else {
    policy = make_policy(policy_name, shape);
  }
  std::unique_ptr<TokenHistory> history;
  if (!trace.token.empty()) {
    history = std::make_unique<TokenHistory>(shape.n_layer, shape.n_expert_used);
    policy->follow(history.get());
  }
  std::unique_ptr<Foresight> foresight;
  if (!predictor.empty()) {
    foresight = std::make_unique<Foresight>(predictor, shape, history.get());
  }
  int64_t evaluation = -1;
  std::vector<StepRow> rows;
  Step step;
  Routes routes;
  const Chunks chunks = chunks_of(trace);
  Slots cache(slots, shape.n_layer * shape.n_expert);
  Replay result;
  result.layer_uses.assign(static_cast<size_t>(shape.n_layer), 0);
  result.layer_misses.assign(static_cast<size_t>(shape.n_layer), 0);
  std::vector<UnitId> units;
  std::vector<UnitId> missing;
  for (const Chunk& chunk : chunks.chunk) {
    const std::span<const UnitId> needed(chunks.unit.data() + chunk.first_unit,
                                         chunk.end_unit - chunk.first_unit);
    const auto layer = static_cast<size_t>(trace.layer[chunk.begin]);
    const auto tokens = static_cast<int64_t>(chunk.end - chunk.begin);
    if (std::exchange(evaluation, trace.evaluation[chunk.begin]) != evaluation) {
      rows.clear();
      for (size_t v = chunk.begin; v < chunk.end; ++v) {
        rows.push_back({trace.sequence.empty() ? 0 : trace.sequence[v],
                        trace.token.empty() ? 0 : trace.token[v]});
      }
      step = {trace.decode[chunk.begin] ? Phase::kDecode : Phase::kPrompt, rows};
      if (history) {
        history->begin(step);
        policy->foresee();
      }
      if (foresight) foresight->begin(step);
    }
    routes.expert.clear();
    policy->begin_layer(trace.layer[chunk.begin], tokens, step.is_single());
    for (size_t v = chunk.begin; v < chunk.end; ++v) {
      const auto first = static_cast<size_t>(trace.offset[v]);
      const auto count = static_cast<size_t>(trace.offset[v + 1]) - first;
      units.clear();
      for (const int32_t expert : trace.expert.subspan(first, count)) {
        units.push_back(static_cast<UnitId>(layer) * static_cast<UnitId>(shape.n_expert) + expert);
      }
      policy->use(units, trace.weight.subspan(first, count));
      for (const int32_t expert : trace.expert.subspan(first, count)) {
        routes.expert.push_back(expert);
      }
    }
    if (history && static_cast<int64_t>(routes.expert.size()) == tokens * shape.n_expert_used) {
      history->take(static_cast<int64_t>(layer), routes);
    }
    if (belady != nullptr) {
      belady->foresee(needed, {chunks.next_use.data() + chunk.first_unit, needed.size()});
    }
    cache.need(needed);
    missing.clear();
    for (const UnitId unit : needed) {
      if (!cache.resident(unit)) missing.push_back(unit);
    }
    if (foresight && step.is_single() && trace.evaluation[chunk.begin] >= count_from) {
      for (const int32_t expert : foresight->named(layer)) {
        const UnitId unit =
            static_cast<UnitId>(layer) * static_cast<UnitId>(shape.n_expert) + expert;
        if (cache.resident(unit)) continue;
        const bool came = std::find(missing.begin(), missing.end(), unit) != missing.end();
        ++(came ? result.foreseen : result.needless);
      }
    }
    if (!step.is_prompt() && trace.evaluation[chunk.begin] >= count_from) {
      result.decode_misses += static_cast<int64_t>(missing.size());
    }
    if (foresight) foresight->take(static_cast<int64_t>(layer), routes);
    for (const UnitId unit : missing) cache.load(unit, *policy);
    if (trace.evaluation[chunk.begin] >= count_from) {
      result.layer_uses[layer] += static_cast<int64_t>(needed.size());
      result.layer_misses[layer] += static_cast<int64_t>(missing.size());
    }
  }
  for (size_t l = 0; l < result.layer_uses.size(); ++l) {
    result.uses += result.layer_uses[l];
    result.misses += result.layer_misses[l];
  }
  return result;
}

}  // namespace stoker
