// This stage penalises the tokens that are among the last penalty_window ones:
//   repetition   logit = logit > 0 ? logit / r : logit * r                (CTRL, arXiv 1909.05858)
//   frequency,   logit -= count * frequency + (count > 0) * presence      (OpenAI API)
//   presence
#include <algorithm>
#include <cmath>
#include <vector>

#include "runtime/sampling/stage.h"

namespace stoker {

namespace {

class Penalties : public SamplerStage {
 public:
  Penalties(int n_vocab, double repetition, double frequency, double presence, int64_t window)
      : repetition_(repetition),
        frequency_(frequency),
        presence_(presence),
        size_(window),
        occurrences_(static_cast<size_t>(n_vocab)) {
    const int64_t tokens = window < 0 ? 4096 : std::min<int64_t>(window, 4096);
    distinct_.reserve(static_cast<size_t>(tokens));
    if (window > 0) window_.reserve(static_cast<size_t>(tokens));
  }

  bool adjusts() const override { return !distinct_.empty(); }
  int64_t history() const override { return size_; }

  void adjust(float* logits) override {
    for (const int32_t token : distinct_) {
      if (!std::isfinite(logits[token])) continue;  // banned, or of damaged weights
      double logit = logits[token];
      logit = logit > 0.0 ? logit / repetition_ : logit * repetition_;
      logit -= occurrences_[static_cast<size_t>(token)].count * frequency_ + presence_;
      logits[token] = bounded_logit(logit);
    }
  }

  void accept(int32_t token) override {
    if (size_ > 0) {
      if (static_cast<int64_t>(window_.size()) < size_) {
        window_.push_back(token);
      } else {
        int32_t& oldest = window_[static_cast<size_t>(counted_ % size_)];
        forget(oldest);
        oldest = token;
      }
    }
    ++counted_;
    Occurrence& occurrence = occurrences_[static_cast<size_t>(token)];
    if (occurrence.count++ == 0) {
      occurrence.slot = static_cast<int32_t>(distinct_.size());
      distinct_.push_back(token);
    }
  }

  void reset() override {
    for (const int32_t token : distinct_) occurrences_[static_cast<size_t>(token)] = {};
    distinct_.clear();
    window_.clear();
    counted_ = 0;
  }

 private:
  // How often a token is in the window, and where it stands in distinct_.
  struct Occurrence {
    int32_t count = 0;
    int32_t slot = 0;
  };

  void forget(int32_t token) {
    Occurrence& occurrence = occurrences_[static_cast<size_t>(token)];
    if (--occurrence.count > 0) return;
    const int32_t moved = distinct_.back();
    distinct_[static_cast<size_t>(occurrence.slot)] = moved;
    occurrences_[static_cast<size_t>(moved)].slot = occurrence.slot;
    distinct_.pop_back();
  }

  double repetition_, frequency_, presence_;
  int64_t size_;                         // tokens in the window; -1: all
  std::vector<Occurrence> occurrences_;  // [n_vocab]
  std::vector<int32_t> distinct_;        // the tokens with a count > 0, in any order
  std::vector<int32_t> window_;          // ring of the last `size_` tokens
  int64_t counted_ = 0;                  // tokens ever counted
};

}  // namespace

std::unique_ptr<SamplerStage> make_penalties_stage(int n_vocab, const SamplerOptions& o) {
  const double repetition = o.number("repetition_penalty", 1.0);
  check_option(repetition > 0.0 && repetition < INFINITY, "repetition_penalty", "a number above 0",
               repetition);
  const double most = kLargestNumber;
  const double frequency = o.number("frequency_penalty", 0.0, -most, most, "a number");
  const double presence = o.number("presence_penalty", 0.0, -most, most, "a number");
  const double window = o.number("penalty_window", 64, -1, INT32_MAX, "-1 (all), 0 (none) or more");
  if (window == 0 || (repetition == 1.0 && frequency == 0.0 && presence == 0.0)) return nullptr;
  return std::make_unique<Penalties>(n_vocab, repetition, frequency, presence,
                                     static_cast<int64_t>(window));
}

}  // namespace stoker
