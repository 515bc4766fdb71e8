// Predicts experts that often follow those of the last two layers (EdgeMoE, Yi et al., 2023),
// counted while the model runs; no profile is needed, but the counts can be saved.
//
// For each pair of layers one and two apart it keeps how often expert b of the later one was used
// by tokens that used expert a of the earlier one. The guess at a layer takes the known experts of
// the two layers before as independent signs of each expert: its log odds against all others are
// those of its share of all tokens plus the sum over signs of ln(p(b
// a) / p(b)).
//
// Counts are bytes; a row is halved when the uses of its expert reach 255, so that they are those
// of the last 128 to 255 times.
//
// State: u8 [2][n_layer][n_expert + 1][n_expert + 1], row a, column b: counts; in the last column
// the uses of a; in the last row the uses of b whatever was before.
#include <algorithm>
#include <cmath>

#include "offload/predict/horizon.h"
#include "offload/predict/predictor.h"
#include "offload/predict/rank.h"
#include "offload/predict/state.h"

namespace stoker {

namespace {

constexpr int64_t kLags = 2;
// The weight of the prior: every pair counts as if it had been seen so often with b's share of all
// tokens.
constexpr float kPrior = 1.0f;
// Signs are not independent: together they count as this many. The value was best on recorded
// mixtures, for one layer's signs as for two layers'.
constexpr float kSigns = 1.2f;

class Transition : public Predictor {
 public:
  explicit Transition(const PredictorShape& shape)
      : shape_(shape),
        row_(shape.n_expert + 1),
        count_(static_cast<size_t>(kLags * shape.n_layer * row_ * row_), 0),
        score_(static_cast<size_t>(shape.n_expert)) {}

  void begin(const Step& step) override {
    tokens_ = step.size();
    single_ = step.is_single();
    horizon_.begin();
    for (Seen& s : seen_) s.layer = -1;
  }

  void observe(int64_t layer, const Routes& routes) override {
    for (const Seen& s : seen_) {
      const int64_t lag = layer - s.layer;
      if (s.layer < 0 || lag < 1 || lag > kLags) continue;
      learn(table(lag, layer), s.experts, routes.expert);
    }
    Seen& oldest = seen_[0].layer <= seen_[1].layer ? seen_[0] : seen_[1];
    oldest.layer = layer;
    oldest.experts.assign(routes.expert.begin(), routes.expert.end());
  }

  size_t predict(int64_t layer, int64_t distance, int64_t width, RouterProbe&,
                 std::vector<Guess>& guesses) override {
    // The tokens of a chunk together choose nearly all experts, so that no guess is needed.
    if (!single_ || layer < 0) return 0;
    size_t n = 0;
    const Horizon::Layers layers = horizon_.at(layer, std::min(distance, kLags), shape_.n_layer);
    for (int64_t l = layers.first; l <= layers.last; ++l) {
      if (!shape_.mixture[static_cast<size_t>(l)] || !foretell(l)) continue;
      if (guesses.size() == n) guesses.emplace_back();
      Guess& guess = guesses[n++];
      guess.layer = l;
      ranker_.rank(score_.data(), 1, false, shape_.n_expert, shape_.n_expert_used, width, guess);
    }
    return n;
  }

  std::string state() const override {
    StateWriter out("transition", shape_);
    out.bytes(count_.data(), count_.size());
    return out.take();
  }

  void set_state(std::string_view bytes) override {
    if (bytes.empty()) return;  // learns as it goes
    StateReader in(bytes, "transition", shape_);
    const std::string_view counts = in.bytes(count_.size());
    in.end();
    std::copy(counts.begin(), counts.end(), count_.begin());
  }

 private:
  struct Seen {
    int64_t layer = -1;
    std::vector<int32_t> experts;  // [tokens][n_expert_used]
  };

  uint8_t* table(int64_t lag, int64_t layer) {
    return count_.data() + ((lag - 1) * shape_.n_layer + layer) * row_ * row_;
  }

  void learn(uint8_t* table, const std::vector<int32_t>& before,
             const std::vector<int32_t>& after) {
    const int64_t used = shape_.n_expert_used;
    for (int64_t t = 0; t < tokens_; ++t) {
      const int32_t* a = before.data() + t * used;
      const int32_t* b = after.data() + t * used;
      for (int64_t i = 0; i <= used; ++i) {
        uint8_t* row = table + (i < used ? a[i] : shape_.n_expert) * row_;
        for (int64_t j = 0; j < used; ++j) ++row[b[j]];
        if (++row[shape_.n_expert] < 255) continue;
        for (int64_t e = 0; e < row_; ++e) row[e] = static_cast<uint8_t>(row[e] / 2);
      }
    }
  }

  // Fills score_ for a layer; returns false where nothing is known of it.
  bool foretell(int64_t layer) {
    bool any = false;
    const auto precedes = [&](const Seen& s) {
      const int64_t lag = layer - s.layer;
      return s.layer >= 0 && lag >= 1 && lag <= kLags &&
             table(lag, layer)[row_ * row_ - 1] != 0;  // uses of all experts
    };
    const float used = static_cast<float>(shape_.n_expert_used);
    const float shrink = kSigns / (used * static_cast<float>(std::max<int64_t>(
                                              1, std::count_if(seen_, seen_ + kLags, precedes))));
    const float share = used / static_cast<float>(shape_.n_expert);
    for (const Seen& s : seen_) {
      if (!precedes(s)) continue;
      const uint8_t* counts = table(layer - s.layer, layer);
      const uint8_t* all = counts + shape_.n_expert * row_;
      const float total = all[shape_.n_expert];
      product_.assign(score_.size(), 1.0);
      for (int32_t a : s.experts) {
        const uint8_t* row = counts + a * row_;
        const float unit = 1 / (static_cast<float>(row[shape_.n_expert]) + kPrior);
        for (size_t b = 0; b < score_.size(); ++b) {
          // The share of all tokens counts one more token that used every expert alike.
          const float p = (static_cast<float>(all[b]) + share) / (total + 1);
          product_[b] *= static_cast<double>((static_cast<float>(row[b]) / p + kPrior) * unit);
        }
      }
      for (size_t b = 0; b < score_.size(); ++b) {
        const float p = (static_cast<float>(all[b]) + share) / (total + 1);
        const float signs = shrink * static_cast<float>(std::log(product_[b]));
        score_[b] = signs + (any ? score_[b] : std::log(p));
      }
      any = true;
    }
    return any;
  }

  PredictorShape shape_;
  int64_t row_;  // n_expert + 1
  int64_t tokens_ = 1;
  bool single_ = true;
  std::vector<uint8_t> count_;  // [lags][n_layer][n_expert + 1][n_expert + 1], of the later layer
  Seen seen_[kLags];
  Horizon horizon_;
  std::vector<float> score_;     // [n_expert]
  std::vector<double> product_;  // [n_expert]
  Ranker ranker_;
};

}  // namespace

std::unique_ptr<Predictor> make_transition_predictor(const PredictorShape& shape) {
  return std::make_unique<Transition>(shape);
}

}  // namespace stoker
