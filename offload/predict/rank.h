// Ranker turns scores of experts into an ordered guess.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "offload/predict/predictor.h"

namespace stoker {

class Ranker {
 public:
  // Ranks the union of each token's `width` best of scores [tokens][n_expert], those that most
  // tokens want first; for one token, its best first, with scores in standard deviations of the row
  // above the score that would be the last of `used` chosen ones.
  void rank(const float* scores, int64_t tokens, int64_t n_expert, int64_t used, int64_t width,
            Guess& guess) {
    width = std::min(width, n_expert);
    order_.resize(static_cast<size_t>(n_expert));
    weight_.assign(static_cast<size_t>(n_expert), 0.0f);
    for (int64_t t = 0; t < tokens; ++t) {
      const float* row = scores + t * n_expert;
      std::iota(order_.begin(), order_.end(), 0);
      std::partial_sort(order_.begin(), order_.begin() + width, order_.end(),
                        [&](int32_t a, int32_t b) { return before(row, a, b); });
      for (int64_t i = 0; i < width; ++i) {
        weight_[static_cast<size_t>(order_[static_cast<size_t>(i)])] +=
            static_cast<float>(width - i);
      }
    }
    guess.experts.clear();
    guess.score.clear();
    std::iota(order_.begin(), order_.end(), 0);
    std::sort(order_.begin(), order_.end(),
              [&](int32_t a, int32_t b) { return before(weight_.data(), a, b); });
    for (int32_t e : order_) {
      if (weight_[static_cast<size_t>(e)] <= 0) break;
      guess.experts.push_back(e);
      guess.score.push_back(weight_[static_cast<size_t>(e)]);
    }
    if (tokens == 1) standardize(scores, n_expert, used, guess);
  }

 private:
  static constexpr float kUnknown = 4;  // the score of a NaN, below the edge

  static void standardize(const float* scores, int64_t n_expert, int64_t used, Guess& guess) {
    float sum = 0, squares = 0;
    for (int64_t e = 0; e < n_expert; ++e) sum += scores[e];
    const float mean = sum / static_cast<float>(n_expert);
    for (int64_t e = 0; e < n_expert; ++e) squares += (scores[e] - mean) * (scores[e] - mean);
    const float deviation = std::sqrt(squares / static_cast<float>(n_expert)) + 1e-20f;
    const size_t last = static_cast<size_t>(std::min<int64_t>(used, n_expert)) - 1;
    const size_t next = std::min(last + 1, guess.experts.size() - 1);
    const float edge =
        (scores[guess.experts[std::min(last, next)]] + scores[guess.experts[next]]) / 2;
    for (size_t i = 0; i < guess.experts.size(); ++i) {
      const float score = (scores[guess.experts[i]] - edge) / deviation;
      guess.score[i] = score == score ? score : -kUnknown;
    }
  }

  // A strict order for any scores, NaN included.
  static bool before(const float* score, int32_t a, int32_t b) {
    const float x = score[a], y = score[b];
    const bool nan_x = x != x, nan_y = y != y;
    if (nan_x != nan_y) return nan_y;
    if (!nan_x && x != y) return x > y;
    return a < b;
  }

  std::vector<int32_t> order_;  // [n_expert]
  std::vector<float> weight_;   // [n_expert]
};

}  // namespace stoker
