// Predicts what followed the same words before (token_history.h), for a whole token ahead: all
// layers of the token that begins, and one by one those of the token after it. The next layers'
// routers are also asked for the nearest layers, because they know words that are new.
#include <memory>

#include "offload/predict/predictor.h"
#include "offload/predict/token_history.h"

namespace stoker {

std::unique_ptr<Predictor> make_next_gate_predictor(const PredictorShape& shape);

namespace {

class History : public Predictor {
 public:
  explicit History(const PredictorShape& shape)
      : shape_(shape), routers_(make_next_gate_predictor(shape)) {}

  void follow(const TokenHistory* history) override { history_ = history; }
  void begin(const Step& step) override {
    rows_ = step.size();
    routers_->begin(step);
  }

  size_t predict(int64_t layer, int64_t distance, int64_t width, RouterProbe& ahead,
                 std::vector<Guess>& guesses) override {
    size_t n = routers_->predict(layer, distance, width, ahead, guesses);
    for (size_t i = 0; i < n; ++i) guesses[i].remembered = false;  // storage is reused
    for (int64_t row = 0; history_ && row < rows_; ++row) {
      if (history_->match(row) == 0) continue;
      if (layer < 0) {
        for (int64_t l = 0; l < shape_.n_layer; ++l) n = foretell(row, 0, l, n, guesses);
      } else {
        n = foretell(row, 1, layer, n, guesses);
      }
    }
    return n;
  }

 private:
  size_t foretell(int64_t row, int64_t tokens, int64_t layer, size_t n,
                  std::vector<Guess>& guesses) const {
    const std::span<const uint16_t> experts = history_->foretold(tokens, layer, row);
    if (experts.empty()) return n;
    if (guesses.size() == n) guesses.emplace_back();
    Guess& guess = guesses[n];
    guess.layer = tokens * shape_.n_layer + layer;
    guess.remembered = true;
    guess.experts.assign(experts.begin(), experts.end());
    guess.score.assign(experts.size(), static_cast<float>(history_->bin(row)));
    return n + 1;
  }

  const PredictorShape shape_;
  const std::unique_ptr<Predictor> routers_;
  const TokenHistory* history_ = nullptr;
  int64_t rows_ = 1;  // of the step
};

}  // namespace

std::unique_ptr<Predictor> make_history_predictor(const PredictorShape& shape) {
  return std::make_unique<History>(shape);
}

}  // namespace stoker
