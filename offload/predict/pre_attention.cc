// This predictor guesses nothing itself: where an architecture routes before attention, the store
// reads what that router chose while the attention is computed (prefetch_certain()), for every
// predictor but `none`. With this one nothing else is read ahead; where routers come after
// attention, all reads are on demand.
#include "offload/predict/predictor.h"

namespace stoker {

namespace {

class PreAttention : public Predictor {
 public:
  size_t predict(int64_t, int64_t, int64_t, RouterProbe&, std::vector<Guess>&) override {
    return 0;
  }
};

}  // namespace

std::unique_ptr<Predictor> make_pre_attention_predictor(const PredictorShape&) {
  return std::make_unique<PreAttention>();
}

}  // namespace stoker
