// The routers of the next layers applied to this layer's hidden state: the residual stream changes
// little from layer to layer (Pre-gated MoE, AdapMoE and others build on that).
#include <algorithm>
#include <numeric>

#include "offload/predict/predictor.h"
#include "offload/predict/rank.h"

namespace stoker {

namespace {

class NextGate : public Predictor {
 public:
  explicit NextGate(const PredictorShape& shape) : shape_(shape) {}

  void begin(int64_t tokens) override { tokens_ = tokens; }

  size_t predict(int64_t layer, int64_t distance, int64_t width, RouterAhead& ahead,
                 std::vector<Guess>& guesses) override {
    // A prompt's tokens choose nearly everything between them: one layer ahead is plenty.
    if (tokens_ > 1) distance = 1;
    size_t n = 0;
    logits_.resize(static_cast<size_t>(tokens_ * shape_.n_expert));
    for (int64_t l = layer + 1; l <= std::min(layer + distance, shape_.n_layer - 1); ++l) {
      if (!shape_.mixture[static_cast<size_t>(l)]) continue;
      if (guesses.size() == n) guesses.emplace_back();
      ahead.logits(l, logits_.data());
      Guess& guess = guesses[n++];
      guess.layer = l;
      ranker_.rank(logits_.data(), tokens_, shape_.n_expert, shape_.n_expert_used,
                   tokens_ == 1 ? width : shape_.n_expert_used, guess);
    }
    return n;
  }

 private:
  PredictorShape shape_;
  int64_t tokens_ = 1;
  std::vector<float> logits_;  // [tokens][n_expert]
  Ranker ranker_;
};

}  // namespace

std::unique_ptr<Predictor> make_next_gate_predictor(const PredictorShape& shape) {
  return std::make_unique<NextGate>(shape);
}

}  // namespace stoker
