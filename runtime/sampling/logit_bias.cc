// This stage adds each token's bias to its logit; -inf bans the token.
#include <cmath>
#include <utility>
#include <vector>

#include "runtime/sampling/stage.h"

namespace stoker {

namespace {

class LogitBias : public SamplerStage {
 public:
  explicit LogitBias(const std::vector<std::pair<int32_t, double>>& bias) : bias_(bias) {}
  bool adjusts() const override { return true; }
  void adjust(float* logits) override {
    for (const auto& [token, bias] : bias_) {
      if (!std::isfinite(logits[token])) continue;
      logits[token] = bias == -INFINITY ? -INFINITY : bounded_logit(logits[token] + bias);
    }
  }

 private:
  std::vector<std::pair<int32_t, double>> bias_;
};

}  // namespace

std::unique_ptr<SamplerStage> make_logit_bias_stage(int n_vocab, const SamplerOptions& options) {
  for (const auto& [token, bias] : options.logit_bias) {
    check_option(token >= 0 && token < n_vocab, "logit_bias", "tokens of the vocabulary", token);
    check_option(bias < INFINITY, "logit_bias", "numbers or -inf", bias);
  }
  if (options.logit_bias.empty()) return nullptr;
  return std::make_unique<LogitBias>(options.logit_bias);
}

}  // namespace stoker
