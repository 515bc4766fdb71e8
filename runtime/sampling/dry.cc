// DRY (github.com/oobabooga/text-generation-webui/pull/5677) penalises repetition: a token that
// would continue a repetition of earlier text loses
// multiplier * base^(length of the repetition - allowed length).
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "runtime/sampling/stage.h"

namespace stoker {

namespace {

class Dry : public SamplerStage {
 public:
  Dry(int n_vocab, double multiplier, double base, int64_t allowed, int64_t window,
      const std::vector<int32_t>& breakers)
      : multiplier_(multiplier),
        base_(base),
        allowed_(allowed),
        window_(window),
        breaks_(static_cast<size_t>(n_vocab)),
        longest_(static_cast<size_t>(n_vocab)) {
    for (const int32_t token : breakers) breaks_[static_cast<size_t>(token)] = true;
  }

  int64_t history() const override { return window_; }
  bool adjusts() const override { return static_cast<int64_t>(tokens_.size()) > allowed_; }

  void adjust(float* logits) override {
    const std::vector<int32_t>& match = match_lengths();
    // match[i] is how many of the tokens just before tokens_[end - i] equal the end of the text;
    // tokens_[end - i] is what followed them.
    const size_t end = tokens_.size();
    for (size_t i = 1; i < match.size(); ++i) {
      if (match[i] < allowed_) continue;
      const auto next = static_cast<size_t>(tokens_[end - i]);
      if (breaks_[next]) continue;
      if (longest_[next] == 0) found_.push_back(static_cast<int32_t>(next));
      longest_[next] = std::max(longest_[next], match[i]);
    }
    for (const int32_t token : found_) {
      int32_t& length = longest_[static_cast<size_t>(token)];
      if (std::isfinite(logits[token])) {
        const double lost = multiplier_ * std::pow(base_, static_cast<double>(length - allowed_));
        logits[token] = bounded_logit(logits[token] - std::min(lost, kLargestNumber));
      }
      length = 0;
    }
    found_.clear();
  }

  void accept(int32_t token) override {
    tokens_.push_back(token);
    // The history is cut only now and then, so that a token's cost does not grow with the text.
    if (window_ > 0 && static_cast<int64_t>(tokens_.size()) >= 2 * window_) {
      tokens_.erase(tokens_.begin(), tokens_.end() - static_cast<std::ptrdiff_t>(window_));
    }
  }

  void reset() override { tokens_.clear(); }

 private:
  // Returns the match lengths by distance from the end: the Z function of the reversed text, cut
  // where a breaker ends a repetition.
  const std::vector<int32_t>& match_lengths() {
    const auto all = static_cast<int64_t>(tokens_.size());
    const int64_t n = window_ > 0 ? std::min(window_, all) : all;
    const auto back = [&](int64_t i) { return tokens_[static_cast<size_t>(all - 1 - i)]; };
    int64_t limit = 0;  // tokens since the last breaker, which no repetition crosses
    while (limit < n && !breaks_[static_cast<size_t>(back(limit))]) ++limit;
    match_.assign(static_cast<size_t>(n), 0);
    if (limit < allowed_) return match_;
    int64_t left = 0, right = 0;
    for (int64_t i = 1; i < n; ++i) {
      int64_t length =
          i < right ? std::min<int64_t>(match_[static_cast<size_t>(i - left)], right - i) : 0;
      while (i + length < n && back(length) == back(i + length)) ++length;
      match_[static_cast<size_t>(i)] = static_cast<int32_t>(length);
      if (i + length > right) {
        left = i;
        right = i + length;
      }
    }
    for (int32_t& length : match_) length = static_cast<int32_t>(std::min<int64_t>(length, limit));
    return match_;
  }

  double multiplier_, base_;
  int64_t allowed_, window_;
  std::vector<bool> breaks_;      // [n_vocab]
  std::vector<int32_t> tokens_;   // accepted, the last ones
  std::vector<int32_t> match_;    // [tokens looked at]
  std::vector<int32_t> longest_;  // [n_vocab] length of the repetition that a token would continue
  std::vector<int32_t> found_;    // tokens that would continue one
};

}  // namespace

std::unique_ptr<SamplerStage> make_dry_stage(int n_vocab, const SamplerOptions& o) {
  const double most = kLargestNumber;
  const double multiplier = o.number("dry_multiplier", 0.0, 0.0, most, "a number of 0 or more");
  const double base = o.number("dry_base", 1.75, 1.0, most, "a number of 1 or more");
  const double allowed = o.number("dry_allowed_length", 2, 1, INT32_MAX, "1 or more");
  const double window = o.number("dry_window", -1, -1, INT32_MAX, "-1 (all), 0 (none) or more");
  const std::vector<int32_t> breakers = o.list("dry_breakers");
  for (const int32_t token : breakers) {
    check_option(token >= 0 && token < n_vocab, "dry_breakers", "tokens of the vocabulary", token);
  }
  if (multiplier == 0.0 || window == 0) return nullptr;
  return std::make_unique<Dry>(n_vocab, multiplier, base, static_cast<int64_t>(allowed),
                               static_cast<int64_t>(window), breakers);
}

}  // namespace stoker
