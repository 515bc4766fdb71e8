// Logits of one position -> one token id, through the stages of stages.inc, then the temperature
// and the draw; temperature 0 is the argmax of what the first stages (bias to mask) have made of
// the logits. Draws come from a counter-based generator and our own exp: a seed gives the same
// tokens on every platform for the same logits.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "runtime/sampling/stage.h"

namespace stoker {

class Sampler {
 public:
  // Throws Error(kOption) where an option is out of range, or of no stage.
  Sampler(int n_vocab, const SamplerOptions& options);
  Sampler(const Sampler&) = delete;
  Sampler& operator=(const Sampler&) = delete;

  // The token that comes next after logits [n_vocab]; the sampler stays as it is but for logprob()
  // and top_logprobs(). Allocates nothing, except where a flat distribution without top-k must be
  // sorted. Throws Error(kModelFile) where a logit is NaN or +inf, Error(kOption) where all are
  // banned.
  int32_t peek(const float* logits);
  // The token that peek() gave is taken: the next peek() is of the position after it.
  void commit(int32_t token);
  // Both.
  int32_t sample(const float* logits);

  // A token that was not chosen here (of the prompt, or forced). Throws Error(kOption) where it is
  // not in the vocabulary.
  void accept(int32_t token);

  // How many tokens before the first choice, the last ones, the stages want accepted; -1: all.
  int64_t history() const;

  // The tokens that may be chosen from now on, a bit each, lowest first [(n_vocab + 31) / 32];
  // empty: all. Throws Error(kOption).
  void set_mask(std::span<const uint32_t> allowed);

  // Of the last peek(), from its unmodified logits, in nats; NaN where the option logprobs is 0.
  double logprob() const { return logprob_; }
  // The `logprobs` most probable tokens of the last peek(), best first.
  const std::vector<std::pair<int, double>>& top_logprobs() const { return top_logprobs_; }

  // Back to the state after construction: no history, no mask, first draw of the seed.
  void reset();

  int n_vocab() const { return n_vocab_; }

 private:
  const float* adjust(const float* logits);
  float checked_max(const float* logits, int32_t* argmax) const;
  void measure(const float* logits, int32_t token);
  double uniform(uint64_t stream) const;

  int n_vocab_;
  std::vector<std::unique_ptr<SamplerStage>> stages_;
  double temperature_;
  double inverse_temperature_;
  bool masked_ = false;  // set_mask() was called
  bool banning_;         // an option can ban tokens
  int logprobs_;
  uint64_t key_;                 // of the generator, from the seed
  uint64_t draws_ = 0;           // positions committed
  std::vector<float> adjusted_;  // [n_vocab] once a stage has adjusted logits
  Candidates candidates_;
  std::vector<Candidate> ranking_;  // of top_logprobs
  double logprob_;
  std::vector<std::pair<int, double>> top_logprobs_;
};

}  // namespace stoker
