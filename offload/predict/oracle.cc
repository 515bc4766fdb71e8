// Replays recorded routing and so shows what a perfect predictor would gain. As soon as a layer
// chooses other experts than the record says, it makes no more guesses until it is loaded again.
//
// State: i64 evaluations; of each: i64 tokens; of each mixture layer: u16 [tokens][n_expert_used].
#include <algorithm>

#include "offload/predict/horizon.h"
#include "offload/predict/predictor.h"
#include "offload/predict/state.h"
#include "runtime/base/errors.h"

namespace stoker {

namespace {

constexpr float kCertain = 4;  // spreads above the edge
constexpr int64_t kMostTokens = int64_t{1} << 24;

class Oracle : public Predictor {
 public:
  explicit Oracle(const PredictorShape& shape)
      : shape_(shape), n_mixture_(std::count(shape.mixture.begin(), shape.mixture.end(), true)) {
    int64_t row = 0;
    for (bool mixture : shape.mixture) row_.push_back(mixture ? row++ : -1);
  }

  void begin(const Step& step) override {
    horizon_.begin();
    ++at_;
    if (at_ >= static_cast<int64_t>(evaluations_.size()) || evaluation().tokens != step.size()) {
      follows_ = false;
    }
  }

  void observe(int64_t layer, const Routes& routes) override {
    if (!follows_) return;
    const uint16_t* expected = chosen(layer);
    follows_ = std::equal(routes.expert.begin(), routes.expert.end(), expected,
                          expected + evaluation().tokens * shape_.n_expert_used,
                          [](int32_t a, uint16_t b) { return a == b; });
  }

  size_t predict(int64_t layer, int64_t distance, int64_t, RouterProbe&,
                 std::vector<Guess>& guesses) override {
    if (!follows_) return 0;
    size_t n = 0;
    const Horizon::Layers layers = horizon_.at(layer, distance, shape_.n_layer);
    for (int64_t l = layers.first; l <= layers.last; ++l) {
      if (!shape_.mixture[static_cast<size_t>(l)]) continue;
      if (guesses.size() == n) guesses.emplace_back();
      Guess& guess = guesses[n++];
      guess.layer = l;
      const uint16_t* chosen = this->chosen(l);
      guess.experts.assign(chosen, chosen + evaluation().tokens * shape_.n_expert_used);
      if (evaluation().tokens > 1) {
        std::sort(guess.experts.begin(), guess.experts.end());
        guess.experts.erase(std::unique(guess.experts.begin(), guess.experts.end()),
                            guess.experts.end());
      }
      guess.score.assign(guess.experts.size(), kCertain);
    }
    return n;
  }

  std::string state() const override {
    StateWriter out("oracle", shape_);
    out.value(static_cast<int64_t>(evaluations_.size()));
    for (const Evaluation& e : evaluations_) {
      out.value(e.tokens);
      out.bytes(experts_.data() + e.first, static_cast<size_t>(n_values(e.tokens)) * 2);
    }
    return out.take();
  }

  void set_state(std::string_view bytes) override {
    StateReader in(bytes, "oracle", shape_);
    std::vector<Evaluation> evaluations;
    std::vector<uint16_t> experts;
    // Every evaluation takes some of the bytes, so that a wrong count fails where they end.
    const int64_t n = in.integer("evaluations", 0, INT32_MAX);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t tokens = in.integer("tokens", 1, kMostTokens);
      const std::string_view values = in.bytes(static_cast<size_t>(n_values(tokens)) * 2);
      evaluations.push_back({tokens, experts.size()});
      experts.resize(experts.size() + values.size() / 2);
      std::memcpy(experts.data() + evaluations.back().first, values.data(), values.size());
    }
    in.end();
    for (uint16_t e : experts) {
      if (e >= shape_.n_expert) {
        throw Error(ErrorKind::kOption, "predictor oracle: state: expected experts below " +
                                            std::to_string(shape_.n_expert) + ", found " +
                                            std::to_string(e));
      }
    }
    evaluations_ = std::move(evaluations);
    experts_ = std::move(experts);
    at_ = -1;
    follows_ = true;
  }

 private:
  struct Evaluation {
    int64_t tokens;
    size_t first;  // index into experts_
  };
  const Evaluation& evaluation() const { return evaluations_[static_cast<size_t>(at_)]; }
  int64_t n_values(int64_t tokens) const { return n_mixture_ * tokens * shape_.n_expert_used; }
  // [tokens][n_expert_used] of a mixture layer.
  const uint16_t* chosen(int64_t layer) const {
    const Evaluation& e = evaluation();
    return experts_.data() + e.first +
           row_[static_cast<size_t>(layer)] * e.tokens * shape_.n_expert_used;
  }

  PredictorShape shape_;
  int64_t n_mixture_;
  std::vector<int64_t> row_;  // [n_layer] number among the mixture layers
  std::vector<Evaluation> evaluations_;
  std::vector<uint16_t> experts_;
  int64_t at_ = -1;  // evaluation under way
  bool follows_ = false;
  Horizon horizon_;
};

}  // namespace

std::unique_ptr<Predictor> make_oracle_predictor(const PredictorShape& shape) {
  return std::make_unique<Oracle>(shape);
}

}  // namespace stoker
