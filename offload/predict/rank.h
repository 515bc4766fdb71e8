// Ranker turns scores of experts into an ordered guess.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "offload/predict/predictor.h"

namespace stoker {

class Ranker {
 public:
  // From scores [rows][n_expert]. Of a prompt: the union of each row's `used` best, those that most
  // rows want first. While generating: the union of each row's `width` best, each with the score of
  // the row that wants it most, in standard deviations of that row above what would be the last of
  // its `used` chosen ones; falling.
  void rank(const float* scores, int64_t rows, bool prompt, int64_t n_expert, int64_t used,
            int64_t width, Guess& guess) {
    width = std::min(prompt ? used : width, n_expert);
    order_.resize(static_cast<size_t>(n_expert));
    weight_.assign(static_cast<size_t>(n_expert), prompt ? 0.0f : kOut);
    for (int64_t t = 0; t < rows; ++t) {
      const float* row = scores + t * n_expert;
      std::iota(order_.begin(), order_.end(), 0);
      std::partial_sort(order_.begin(), order_.begin() + width, order_.end(),
                        [&](int32_t a, int32_t b) { return before(row, a, b); });
      if (!prompt) standardize(row, n_expert, used, width);
      for (int64_t i = 0; i < width; ++i) {
        float& weight = weight_[static_cast<size_t>(order_[static_cast<size_t>(i)])];
        if (prompt) {
          weight += static_cast<float>(width - i);
        } else {
          weight = std::max(weight, score_[static_cast<size_t>(i)]);
        }
      }
    }
    guess.experts.clear();
    guess.score.clear();
    if (rows != 1) {  // else they are in order
      std::iota(order_.begin(), order_.end(), 0);
      std::sort(order_.begin(), order_.end(),
                [&](int32_t a, int32_t b) { return before(weight_.data(), a, b); });
    }
    for (int32_t e : order_) {
      const float weight = weight_[static_cast<size_t>(e)];
      if (weight <= (prompt ? 0.0f : kOut)) break;
      guess.experts.push_back(e);
      guess.score.push_back(weight);
    }
  }

 private:
  static constexpr float kUnknown = 4;  // below the edge: the score of a NaN
  static constexpr float kOut = std::numeric_limits<float>::lowest();  // of what no row guesses

  // Fills score_ [width] of a row's best, which are first in order_.
  void standardize(const float* scores, int64_t n_expert, int64_t used, int64_t width) {
    float sum = 0, squares = 0;
    for (int64_t e = 0; e < n_expert; ++e) sum += scores[e];
    const float mean = sum / static_cast<float>(n_expert);
    for (int64_t e = 0; e < n_expert; ++e) squares += (scores[e] - mean) * (scores[e] - mean);
    const float deviation = std::sqrt(squares / static_cast<float>(n_expert)) + 1e-20f;
    const size_t last = static_cast<size_t>(std::min<int64_t>(used, n_expert)) - 1;
    const size_t next = std::min(last + 1, static_cast<size_t>(width) - 1);
    const float edge = (scores[order_[std::min(last, next)]] + scores[order_[next]]) / 2;
    score_.resize(static_cast<size_t>(width));
    for (size_t i = 0; i < score_.size(); ++i) {
      const float score = (scores[order_[i]] - edge) / deviation;
      score_[i] = score == score ? score : -kUnknown;
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
  std::vector<float> score_;    // [width]
};

}  // namespace stoker
