#include "offload/predict/replay.h"

#include <algorithm>
#include <cmath>

namespace stoker {

namespace {

class Recorded : public RouterProbe {
 public:
  Recorded(const PredictorShape& shape, const Recording& recording)
      : shape_(shape), recording_(recording) {}
  void at(int64_t layer, int64_t token) {
    hidden_ = recording_.hidden + ((layer + 1) * recording_.tokens + token) * shape_.n_embd;
  }
  void logits(int64_t layer, float* out) override {
    float squares = 0;
    for (int64_t i = 0; i < shape_.n_embd; ++i) squares += hidden_[i] * hidden_[i];
    const float unit = 1 / std::sqrt(squares / static_cast<float>(shape_.n_embd) + 1e-20f);
    for (int64_t e = 0; e < shape_.n_expert; ++e) {
      const float* row = recording_.routers + (layer * shape_.n_expert + e) * shape_.n_embd;
      float sum = 0;
      for (int64_t i = 0; i < shape_.n_embd; ++i) sum += row[i] * hidden_[i];
      out[e] = sum * unit;
    }
  }
  const float* hidden() const override { return hidden_; }

 private:
  const PredictorShape& shape_;
  const Recording& recording_;
  const float* hidden_ = nullptr;  // [n_embd]
};

}  // namespace

Recall replay(Predictor& predictor, const PredictorShape& shape, const Recording& recording,
              int64_t distance, int64_t width, int64_t count_from) {
  const size_t n_layer = static_cast<size_t>(shape.n_layer);
  Recall recall{std::vector<int64_t>(n_layer, 0), std::vector<int64_t>(n_layer, 0)};
  Recorded ahead(shape, recording);
  Routes routes;
  routes.weight.assign(static_cast<size_t>(shape.n_expert_used), 1.0f);
  std::vector<Guess> guesses;
  const StepRow row;
  const auto chosen = [&](int64_t token, int64_t layer) {
    return std::span(recording.experts + (token * shape.n_layer + layer) * shape.n_expert_used,
                     static_cast<size_t>(shape.n_expert_used));
  };
  for (int64_t t = 0; t < recording.tokens; ++t) {
    predictor.begin({Phase::kDecode, std::span(&row, 1)});
    for (int64_t layer = -1; layer < shape.n_layer; ++layer) {
      if (layer >= 0) {
        if (!shape.mixture[static_cast<size_t>(layer)]) continue;
        const auto used = chosen(t, layer);
        if (t >= count_from) recall.asked[static_cast<size_t>(layer)] += shape.n_expert_used;
        routes.expert.assign(used.begin(), used.end());
        predictor.observe(layer, routes);
      }
      ahead.at(layer, t);
      const size_t n = predictor.predict(layer, distance, width, ahead, guesses);
      if (t < count_from) continue;
      for (size_t g = 0; g < n; ++g) {
        // At the start of a forward pass there are guesses at nearer layers too, which are skipped.
        if (guesses[g].layer != layer + distance) continue;
        for (int32_t e : chosen(t, guesses[g].layer)) {
          const auto& guessed = guesses[g].experts;
          recall.found[static_cast<size_t>(guesses[g].layer)] +=
              std::find(guessed.begin(), guessed.end(), e) != guessed.end();
        }
      }
    }
  }
  return recall;
}

}  // namespace stoker
