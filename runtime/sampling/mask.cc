// This stage bans all tokens but those that a grammar or a schema allows. The mask is set anew for
// each position.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "runtime/base/errors.h"
#include "runtime/sampling/stage.h"

namespace stoker {

namespace {

class Mask : public SamplerStage {
 public:
  explicit Mask(int n_vocab) : n_vocab_(n_vocab) {}
  bool adjusts() const override { return !allowed_.empty(); }

  void adjust(float* logits) override {
    for (int32_t first = 0; first < n_vocab_; first += 32) {
      const uint32_t word = allowed_[static_cast<size_t>(first / 32)];
      if (word == ~uint32_t{0}) continue;
      const int32_t n = std::min(32, n_vocab_ - first);
      for (int32_t i = 0; i < n; ++i) {
        if ((word >> i & 1) == 0) logits[first + i] = -INFINITY;
      }
    }
  }

  void set_mask(std::span<const uint32_t> allowed) override {
    const size_t words = static_cast<size_t>(n_vocab_ + 31) / 32;
    if (!allowed.empty() && allowed.size() != words) {
      throw Error(ErrorKind::kOption, "mask: expected " + std::to_string(words) +
                                          " words of 32 tokens, found " +
                                          std::to_string(allowed.size()));
    }
    allowed_.assign(allowed.begin(), allowed.end());
  }

  void reset() override { allowed_.clear(); }

 private:
  int32_t n_vocab_;
  std::vector<uint32_t> allowed_;  // a bit a token; empty: all
};

}  // namespace

std::unique_ptr<SamplerStage> make_mask_stage(int n_vocab, const SamplerOptions&) {
  return std::make_unique<Mask>(n_vocab);
}

}  // namespace stoker
