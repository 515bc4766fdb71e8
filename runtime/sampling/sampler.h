// The sampler turns the logits of one position into one token id: it applies the stages of
// stages.inc, then the temperature, then draws. Temperature 0 takes the argmax of the logits as the
// first stages (bias to mask) have adjusted them. Draws use a counter-based generator and our own
// exp, so a seed gives the same tokens on every platform for the same logits.
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
  // Throws Error(kOption) where an option is out of range, or belongs to no stage.
  Sampler(int n_vocab, const SamplerOptions& options);
  Sampler(const Sampler&) = delete;
  Sampler& operator=(const Sampler&) = delete;

  // Chooses the token that follows `logits` [n_vocab]; of the sampler's state only logprob() and
  // top_logprobs() change. Allocates nothing, except where a flat distribution without top-k must
  // be sorted. Throws Error(kModelFile) where a logit is NaN or +inf, Error(kOption) where all are
  // banned.
  int32_t peek(const float* logits);
  // Accepts the token that peek() gave and moves on: the next peek() is of the position after it.
  void commit(int32_t token);
  // Calls peek(), then commit().
  int32_t sample(const float* logits);

  // Adds a token to the history that was not chosen here (it is of the prompt, or forced). Throws
  // Error(kOption) where it is not in the vocabulary.
  void accept(int32_t token);

  // The number of last prompt tokens that the stages need accepted before the first choice; -1
  // means all.
  int64_t history() const;

  // Sets which tokens may be chosen from now on, one bit each, lowest first
  // [(n_vocab + 31) / 32]; an empty mask allows all. Throws Error(kOption).
  void set_mask(std::span<const uint32_t> allowed);

  // The log-probability of the last peek()'s token, from the unmodified logits, in nats; NaN where
  // the option logprobs is 0.
  double logprob() const { return logprob_; }
  // The `logprobs` most probable tokens of the last peek(), best first.
  const std::vector<std::pair<int, double>>& top_logprobs() const { return top_logprobs_; }

  // Restores the state after construction: no history, no mask, first draw of the seed.
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
  uint64_t key_;                 // the generator's key, from the seed
  uint64_t draws_ = 0;           // positions committed
  std::vector<float> adjusted_;  // [n_vocab] once a stage has adjusted logits
  Candidates candidates_;
  std::vector<Candidate> ranking_;  // scratch for top_logprobs_
  double logprob_;
  std::vector<std::pair<int, double>> top_logprobs_;
};

}  // namespace stoker
