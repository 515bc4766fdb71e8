// Applies the routers of the next layers to this layer's hidden state: the residual stream changes
// little from layer to layer (Pre-gated MoE, AdapMoE and others build on that).
#include <algorithm>
#include <numeric>

#include "offload/predict/horizon.h"
#include "offload/predict/predictor.h"
#include "offload/predict/rank.h"

namespace stoker {

namespace {

class NextGate : public Predictor {
 public:
  explicit NextGate(const PredictorShape& shape) : shape_(shape) {}

  void begin(const Step& step) override {
    tokens_ = step.size();
    prompt_ = step.is_prompt();
    horizon_.begin();
  }

  size_t predict(int64_t layer, int64_t distance, int64_t width, RouterProbe& ahead,
                 std::vector<Guess>& guesses) override {
    if (layer < 0) return 0;  // an embedding has little in common with what routers read
    size_t n = 0;
    logits_.resize(static_cast<size_t>(tokens_ * shape_.n_expert));
    const Horizon::Layers layers = horizon_.at(layer, distance, shape_.n_layer);
    for (int64_t l = layers.first; l <= layers.last; ++l) {
      if (!shape_.mixture[static_cast<size_t>(l)]) continue;
      if (guesses.size() == n) guesses.emplace_back();
      ahead.logits(l, logits_.data());
      Guess& guess = guesses[n++];
      guess.layer = l;
      ranker_.rank(logits_.data(), tokens_, prompt_, shape_.n_expert, shape_.n_expert_used, width,
                   guess);
    }
    return n;
  }

 private:
  PredictorShape shape_;
  bool prompt_ = false;
  int64_t tokens_ = 1;
  Horizon horizon_;
  std::vector<float> logits_;  // [tokens][n_expert]
  Ranker ranker_;
};

}  // namespace

std::unique_ptr<Predictor> make_next_gate_predictor(const PredictorShape& shape) {
  return std::make_unique<NextGate>(shape);
}

}  // namespace stoker
