// The sampling chain: logits of one position -> one token id.
//
// Order (that of llama.cpp's default chain): logit bias, penalties, top-k, top-p, min-p,
// temperature, draw. Each stage sees the softmax of what the stage before it left, so that top-p
// and min-p are taken at temperature 1. Temperature 0 is the argmax after bias and penalties.
//   bias         logit += bias                                            (-inf bans the token)
//   repetition   logit = logit > 0 ? logit / r : logit * r                (CTRL, arXiv 1909.05858)
//   frequency,   logit -= count * frequency + (count > 0) * presence      (OpenAI API)
//   presence     where count is over the last penalty_window accepted tokens
//   top-k        the k largest logits (ties: the lower id first)
//   top-p        the fewest tokens, most probable first, whose probabilities reach p
//   min-p        tokens with p(token) >= min_p * p(most probable)
// Draws come from a counter-based generator and our own exp: a seed gives the same tokens on every
// platform for the same logits.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace stoker {

class Sampler {
 public:
  struct Options {
    double temperature = 0.0;         // >= 0; 0: greedy
    int top_k = 0;                    // 0: off
    double top_p = 1.0;               // 0..1; 1: off
    double min_p = 0.0;               // 0..1; 0: off
    double repetition_penalty = 1.0;  // > 0; 1: off
    double frequency_penalty = 0.0;
    double presence_penalty = 0.0;
    int penalty_window = 64;                         // tokens; -1: all, 0: none
    std::vector<std::pair<int, double>> logit_bias;  // token id, what is added to its logit
    uint64_t seed = 0;
    int logprobs = 0;  // > 0: sample() sets logprob() and that many top_logprobs()
  };

  // Throws Error(kOption) where an option is out of range.
  Sampler(int n_vocab, const Options& options);

  // Chooses a token from logits [n_vocab] AND accepts it: do not call accept() for it again.
  // Allocates nothing, except where a flat distribution without top-k must be sorted.
  // Throws Error(kModelFile) where a logit is NaN or +inf, Error(kOption) where all are banned.
  int sample(const float* logits);

  // Counts a token that sample() did not choose (of the prompt, or forced) for the penalties.
  // Throws Error(kOption) where it is not in the vocabulary.
  void accept(int token);

  // Of the last sample(), from its unmodified logits, in nats; NaN where Options::logprobs is 0.
  double logprob() const { return logprob_; }
  // The Options::logprobs most probable tokens of the last sample(), best first.
  const std::vector<std::pair<int, double>>& top_logprobs() const { return top_logprobs_; }

  // Back to the state after construction: no history, first draw of the seed.
  void reset();

  int n_vocab() const { return n_vocab_; }
  const Options& options() const { return options_; }

 private:
  struct Candidate {
    float logit;
    int32_t id;
  };
  // How often a token is in the penalty window, and where it stands in distinct_.
  struct Occurrence {
    int32_t count;
    int32_t slot;
  };

  void validate() const;
  const float* adjust(const float* logits);
  float checked_max(const float* logits, int* argmax) const;
  void select(const float* logits, int64_t k, std::vector<Candidate>* best) const;
  int draw(const float* logits, float max);
  int draw_from_all(const float* logits, float max);
  void take_top_p(const float* logits, float max);
  void take_min_p(const float* logits, float max);
  bool cut_top_p(double total, float max);
  double sum_blocks(const float* logits, float max, double inverse_temperature);
  void measure(const float* logits, int token);
  void count(int token);
  void forget(int token);
  double uniform();

  int n_vocab_;
  Options options_;
  bool penalize_;
  double log_min_p_;
  double inverse_temperature_;
  uint64_t key_;                         // of the generator, from the seed
  uint64_t draws_ = 0;                   // its counter
  std::vector<float> adjusted_;          // [n_vocab] where there is a bias or penalty, else empty
  std::vector<Occurrence> occurrences_;  // [n_vocab] where there are penalties, else empty
  std::vector<int32_t> distinct_;        // the tokens with a count > 0, in any order
  std::vector<int32_t> window_;          // ring of the last penalty_window tokens
  int64_t counted_ = 0;                  // tokens ever counted
  std::vector<Candidate> candidates_;    // what the stages have left, best first
  std::vector<Candidate> ranking_;       // of top_logprobs
  std::vector<double> cumulative_;       // running sums of weights: of candidates or of blocks
  double logprob_;
  std::vector<std::pair<int, double>> top_logprobs_;
};

}  // namespace stoker
