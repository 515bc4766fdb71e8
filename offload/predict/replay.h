// A predictor on recorded hidden states and routing, as if the tokens were decoded: what would it
// have found?
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "offload/predict/predictor.h"

namespace stoker {

// Tokens of one or several sequences, one after another.
struct Recording {
  int64_t tokens = 0;
  // [n_layer + 1][tokens][n_embd]: the embeddings, then what each layer's look-ahead sees.
  const float* hidden = nullptr;
  const int32_t* experts = nullptr;  // [tokens][n_layer][n_expert_used]; unread for dense layers
  // [n_layer][n_expert][n_embd]: logits = routers . (hidden / rms(hidden)), as far as order goes.
  const float* routers = nullptr;
};

struct Recall {
  std::vector<int64_t> found, asked;  // [n_layer] experts that were used: guessed, and all
};

// Guesses `distance` ahead, `width` experts wide, over tokens [count_from, tokens); those before
// are only observed.
Recall replay(Predictor& predictor, const PredictorShape& shape, const Recording& recording,
              int64_t distance, int64_t width, int64_t count_from);

}  // namespace stoker
