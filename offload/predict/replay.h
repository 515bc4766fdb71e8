// Runs a predictor on recorded hidden states and routing, as if the tokens were decoded, and counts
// what it would have found.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "offload/predict/predictor.h"

namespace stoker {

// The tokens of one or several sequences, one after another.
struct Recording {
  int64_t tokens = 0;
  // [n_layer + 1][tokens][n_embd]: the embeddings, then what each layer's look-ahead sees.
  const float* hidden = nullptr;
  const int32_t* experts = nullptr;  // [tokens][n_layer][n_expert_used]; unread for dense layers
  // routers [n_layer][n_expert][n_embd]: routers . (hidden / rms(hidden)) orders the experts as the
  // logits do.
  const float* routers = nullptr;
};

struct Recall {
  std::vector<int64_t> found, asked;  // [n_layer] used experts: guessed, and all
};

// Makes guesses `distance` ahead, `width` experts wide, over tokens [count_from, tokens); the
// earlier tokens are only observed.
Recall replay(Predictor& predictor, const PredictorShape& shape, const Recording& recording,
              int64_t distance, int64_t width, int64_t count_from);

}  // namespace stoker
