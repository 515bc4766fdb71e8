// Evicts the unit with the least worth: the expected discount e^(-t / 12) of its next use in t
// tokens, predicted by a logistic model that learns while it runs.
//
// The model's inputs, for each unit after each visit of its layer, are the time since the last use,
// uses decayed with half-lives of 4 to 256 tokens, the router's weight at the last use, and what
// the paths of similar tokens predict (path_memory.h). The target, one visit later, is 1 where the
// layer used the unit, else the discounted worth that the model gives it now (temporal
// differences), so that nothing must be kept until a distant use is seen.
//
// Where the tokens are known and the last of them occurred before, what followed there
// (token_history.h) says when units will be used, with a confidence that is measured: the worth is
// a mixture of both predictions.
//
// The policy is deterministic and begins with weights rounded from what it learnt on three recorded
// traces.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "offload/policy/path_memory.h"
#include "offload/policy/policy.h"
#include "offload/policy/token_clock.h"
#include "offload/predict/token_history.h"

namespace stoker {

namespace {

constexpr std::array<float, 4> kHalfLife = {4, 16, 64, 256};  // tokens
// Constant, age, four counts, weight, path.
constexpr int kInputs = 8;
using Inputs = std::array<float, kInputs>;
constexpr Inputs kStart = {-1.1f, -0.3f, 0.08f, 0.3f, 0.1f, 0.0f, 0.28f, 0.55f};
constexpr float kLimit = 8.0f;        // bound of a learnt weight
constexpr float kDiscount = 0.92f;    // per token: e^(-1/12)
constexpr float kRate = 0.03f;        // of learning, per visit
constexpr float kLeastShare = 0.01f;  // of similar tokens: unit of the path input
constexpr int64_t kLongAgo = 1000;    // tokens
constexpr int64_t kOutlooks = 4;      // scorings of the layers ahead per token
// What followed an earlier occurrence of the last tokens, by its length (TokenHistory::bin).
constexpr int64_t kForesight = 64;  // tokens
constexpr std::array<float, TokenHistory::kBins> kComesTrue = {0.5f, 0.6f, 0.7f, 0.8f, 0.9f, 0.9f};
constexpr std::array<float, TokenHistory::kBins> kGoesOn = {0.2f, 0.4f, 0.6f, 0.8f, 0.9f, 0.95f};
constexpr float kReturn = 0.2f;        // a text that leaves what is predicted often returns to it
constexpr float kOutcome = 1.0f / 32;  // weight of one more outcome

float logistic(float z) { return 1.0f / (1.0f + std::exp(-z)); }

class Reuse : public Policy {
 public:
  explicit Reuse(const PolicyShape& shape)
      : n_layer_(shape.n_layer),
        n_expert_(shape.n_expert),
        layers_an_outlook_((n_layer_ + kOutlooks - 1) / kOutlooks),
        paths_(shape),
        units_(static_cast<size_t>(n_layer_ * n_expert_)),
        worth_(units_.size(), 0.0f),
        used_(static_cast<size_t>(n_expert_), 0),
        share_(static_cast<size_t>(n_expert_), 0.0f) {
    for (size_t i = 0; i < kHalfLife.size(); ++i) decay_[i] = std::exp2(-1.0f / kHalfLife[i]);
    for (size_t t = 0; t < discount_.size(); ++t) {
      discount_[t] = std::pow(kDiscount, static_cast<float>(t));
    }
  }

  void follow(const TokenHistory* history) override { history_ = history; }

  void foresee() override {
    learn();
    if (bin_ >= 0) {
      float& goes_on = goes_on_[static_cast<size_t>(bin_)];
      goes_on += ((history_->as_foretold() ? 1.0f : 0.0f) - goes_on) * kOutcome;
    }
    const bool foresaw = bin_ >= 0;
    bin_ = history_->is_single() && history_->match() > 0 ? history_->bin() : -1;
    for (size_t t = 0; bin_ >= 0 && t < goes_so_far_.size(); ++t) {
      goes_so_far_[t] =
          std::pow(goes_on_[static_cast<size_t>(bin_)], kReturn * static_cast<float>(t));
    }
    if (history_->as_foretold() || (!foresaw && bin_ < 0)) return;
    for (int64_t l = 0; l < n_layer_; ++l) {
      look_back(l, 0);
      rate(l);
    }
  }

  void begin_layer(int64_t layer, int64_t tokens, bool follows) override {
    learn();
    if (clock_.begin_layer(layer, tokens)) paths_.begin(follows);
    open(layer, tokens, follows);
  }

  void use(std::span<const UnitId> units, std::span<const float> weights) override {
    if (units.empty()) return;
    if (!open_ || units[0] / n_expert_ != layer_) begin_layer(units[0] / n_expert_, 1, true);
    const int64_t token = clock_.next_use();
    std::array<float, kHalfLife.size()> one;
    const int64_t left = std::max<int64_t>(0, tokens_ - ++uses_);
    for (size_t i = 0; i < one.size(); ++i) one[i] = power(i, left);
    experts_.clear();
    for (size_t k = 0; k < units.size(); ++k) {
      Unit& unit = units_[static_cast<size_t>(units[k])];
      for (size_t i = 0; i < one.size(); ++i) unit.count[i] += one[i];
      unit.token = token;
      unit.weight = weights[k];
      experts_.push_back(static_cast<int32_t>(units[k] - layer_ * n_expert_));
      used_[static_cast<size_t>(experts_.back())] = 1;
    }
    paths_.take(token, layer_, experts_);
  }

  size_t victim(std::span<const UnitId> candidates) override {
    learn();
    size_t least = 0;
    float least_worth = worth_[static_cast<size_t>(candidates[0])];
    for (size_t i = 1; i < candidates.size(); ++i) {
      const float worth = worth_[static_cast<size_t>(candidates[i])];
      if (worth < least_worth) {
        least = i;
        least_worth = worth;
      }
    }
    return least;
  }

 private:
  struct Unit {
    std::array<float, kHalfLife.size()> count{};  // decayed uses, as of the layer's last visit
    int64_t token = -kLongAgo;                    // token of the last use
    float weight = 0;                             // router weight at that use
    float own = 0;     // the model's score without the path's input, at the layer's last visit
    float score = 0;   // the score with it
    int64_t due = -1;  // token of the next use predicted by the history; < 0: none
    Inputs inputs{};   // at the layer's last visit; [0] is 0 before the first
  };

  float power(size_t half_life, int64_t tokens) const {
    return tokens == 0 ? 1.0f : std::pow(decay_[half_life], static_cast<float>(tokens));
  }

  void open(int64_t layer, int64_t tokens, bool follows) {
    follows_ = follows;
    layer_ = layer;
    tokens_ = tokens;
    uses_ = 0;
    open_ = true;
    std::fill(used_.begin(), used_.end(), uint8_t{0});
    std::array<float, kHalfLife.size()> decay;
    for (size_t i = 0; i < decay.size(); ++i) decay[i] = power(i, tokens);
    Unit* units = units_.data() + layer * n_expert_;
    for (int64_t e = 0; e < n_expert_; ++e) {
      for (size_t i = 0; i < decay.size(); ++i) units[e].count[i] *= decay[i];
    }
  }

  // Learns from the layer's uses, which are now known, and scores its units anew.
  void learn() {
    if (!open_ || uses_ == 0) return;
    open_ = false;
    const int64_t now = clock_.now();
    paths_.compare(now, layer_);
    paths_.weigh(now);
    paths_.foretell(layer_, false, share_);
    Inputs step{};
    for (int64_t e = 0; e < n_expert_; ++e) {
      Unit& unit = units_[static_cast<size_t>(layer_ * n_expert_ + e)];
      const Inputs before = unit.inputs;
      const bool known = before[0] != 0;
      look(unit, now, share_[static_cast<size_t>(e)]);
      // In a chunk of several tokens it is unknown which of them came next.
      if (follows_ && known) {
        const float target =
            used_[static_cast<size_t>(e)] != 0 ? 1.0f : kDiscount * logistic(unit.score);
        const float error = target - logistic(dot(before));
        for (size_t i = 0; i < kInputs; ++i) step[i] += error * before[i];
      }
    }
    const float share = kRate / static_cast<float>(n_expert_);
    for (size_t i = 0; i < kInputs; ++i) {
      weight_[i] = std::clamp(weight_[i] + share * step[i], -kLimit, kLimit);
    }
    if (bin_ >= 0) {
      book_foretold();
      look_back(layer_, 1);
    }
    rate(layer_);
    if (++layers_since_outlook_ >= layers_an_outlook_) {
      layers_since_outlook_ = 0;
      look_out();
    }
  }

  // Sets the unit's inputs and scores from what is known after a visit of its layer.
  void look(Unit& unit, int64_t now, float share) {
    Inputs& x = unit.inputs;
    x[0] = 1;
    x[1] = std::log(static_cast<float>(std::min(now - unit.token, kLongAgo) + 1));
    for (size_t i = 0; i < unit.count.size(); ++i) x[2 + i] = std::log(unit.count[i] + 0.1f);
    x[6] = unit.weight;
    x[7] = path_input(share);
    unit.own = dot(x) - weight_[7] * x[7];
    unit.score = unit.own + weight_[7] * x[7];
  }

  static float path_input(float share) {
    return share == 0 ? 0.0f : std::log(share / kLeastShare + 1.0f);
  }

  float dot(const Inputs& x) const {
    float sum = 0;
    for (size_t i = 0; i < kInputs; ++i) sum += weight_[i] * x[i];
    return sum;
  }

  // Scores the units of the layers ahead by the path as far as it is known.
  void look_out() {
    for (int64_t layer = layer_ + 1; layer < n_layer_; ++layer) {
      paths_.foretell(layer, true, share_);
      for (int64_t e = 0; e < n_expert_; ++e) {
        Unit& unit = units_[static_cast<size_t>(layer * n_expert_ + e)];
        unit.score = unit.own + weight_[7] * path_input(share_[static_cast<size_t>(e)]);
      }
      rate(layer);
    }
  }

  // Records, for the present token, whether its layer took the predicted experts.
  void book_foretold() {
    float& comes_true = comes_true_[static_cast<size_t>(bin_)];
    for (uint16_t e : history_->foretold(0, layer_)) {
      comes_true += ((used_[e] != 0 ? 1.0f : 0.0f) - comes_true) * kOutcome;
    }
  }

  // Sets when the layer's units are due, as the history predicts from `ahead` tokens on.
  void look_back(int64_t layer, int64_t ahead) {
    Unit* units = units_.data() + layer * n_expert_;
    for (int64_t e = 0; e < n_expert_; ++e) units[e].due = -1;
    if (bin_ < 0) return;
    const int64_t present = clock_.now() + (ahead == 0 ? 1 : 0);
    for (int64_t t = kForesight; t >= ahead; --t) {
      for (uint16_t e : history_->foretold(t, layer)) units[e].due = present + t;
    }
  }

  // Computes the worth of the layer's units.
  void rate(int64_t layer) {
    for (int64_t e = 0; e < n_expert_; ++e) {
      const size_t id = static_cast<size_t>(layer * n_expert_ + e);
      worth_[id] = worth(units_[id]);
    }
  }

  float worth(const Unit& unit) const {
    float worth = logistic(unit.score);
    if (bin_ >= 0) {
      const size_t b = static_cast<size_t>(bin_);
      const bool due = unit.due >= 0;
      const int64_t left =
          due ? std::clamp<int64_t>(unit.due - clock_.now(), 0, kForesight + 1) : 0;
      const size_t t = static_cast<size_t>(left);
      const float sure = comes_true_[b] * goes_so_far_[t];
      worth = (due ? sure * discount_[t] : 0.0f) + (1 - sure) * worth;
    }
    return worth;
  }

  int64_t n_layer_, n_expert_;
  int64_t layers_an_outlook_;
  int64_t layers_since_outlook_ = 0;
  TokenClock clock_;
  PathMemory paths_;
  std::array<float, kHalfLife.size()> decay_{};  // decay of a count per token
  Inputs weight_ = kStart;
  std::vector<Unit> units_;       // [n_layer * n_expert]
  std::vector<float> worth_;      // [n_layer * n_expert]
  std::vector<int32_t> experts_;  // of the token in use()
  std::vector<uint8_t> used_;     // [n_expert] by this visit of the layer
  std::vector<float> share_;      // [n_expert] scratch
  int64_t layer_ = 0;             // of this visit
  int64_t tokens_ = 1;            // of this visit
  bool follows_ = true;           // this visit's one token follows the last visit's
  int64_t uses_ = 0;              // tokens of this visit that use() has reported
  bool open_ = false;             // whether there is a visit that has not been learnt from
  const TokenHistory* history_ = nullptr;
  int bin_ = -1;  // bin of the history's occurrence; -1: none
  std::array<float, TokenHistory::kBins> comes_true_ = kComesTrue, goes_on_ = kGoesOn;
  std::array<float, kForesight + 2> goes_so_far_{}, discount_{};  // in t tokens
};

}  // namespace

std::unique_ptr<Policy> make_reuse_policy(const PolicyShape& shape) {
  return std::make_unique<Reuse>(shape);
}

}  // namespace stoker
