// The tokens of one position that the stages have left: all of the vocabulary, or a list. A stage
// sees the softmax of what the stage before it left. The list is sorted once a stage needs it.
#pragma once

#include <cstdint>
#include <vector>

namespace stoker {

struct Candidate {
  float logit;
  int32_t id;
};

class Candidates {
 public:
  explicit Candidates(int n_vocab) : n_vocab_(n_vocab) {}
  // Reserves memory for lists of k tokens.
  void reserve(int64_t k);

  // Starts with all tokens of `logits` [n_vocab], which must outlive the stages' calls; `max` is
  // the largest of them.
  void begin(const float* logits, float max);

  void keep_best(int64_t k);
  // Keeps the fewest tokens, most probable first, whose probabilities reach p.
  void keep_mass(double p);
  // Keeps the tokens whose log-probability is within `log_p` (<= 0) of the largest.
  void keep_within(double log_p);
  // Returns the candidates as a list, best first (ties: the lower id). Stages may take tokens out
  // of it, but must leave at least one.
  std::vector<Candidate>& sorted();

  // Draws a token in proportion to e^(logit * inverse_temperature); `uniform` is in [0, 1).
  int32_t draw(double uniform, double inverse_temperature);

  // Finds the k best finite logits of `logits` [n_vocab], best first.
  void select(const float* logits, int64_t k, std::vector<Candidate>* best) const;
  // Sets cumulative_[b] to the sum of the weights of all tokens up to and including block b;
  // returns the total.
  double sum_blocks(const float* logits, float max, double inverse_temperature);

 private:
  int32_t draw_from_all(double uniform, double inverse_temperature);
  bool cut_mass(double p, double total);
  float max() const { return whole_ || !sorted_ ? max_ : list_.front().logit; }

  int n_vocab_;
  const float* logits_ = nullptr;  // [n_vocab]
  float max_ = 0;
  bool whole_ = true;
  bool sorted_ = false;
  std::vector<Candidate> list_;
  std::vector<double> cumulative_;  // running sums of weights: of the list or of blocks
};

}  // namespace stoker
