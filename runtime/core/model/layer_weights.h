// The matrices and vectors of a model, as families name them in their tensor tables
// (tensor_row.h). Matrices are views; norms and biases are f32.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels_cpu/matrix.h"

namespace stoker {

using Vector = std::vector<float>;  // a norm's weight or a bias; empty: none

struct LayerWeights {
  Vector attn_norm;   // [n_embd]
  Matrix q, k, v, o;  // [heads * head_dim][n_embd]; o: [n_embd][n_head * head_dim_v]
  Vector q_bias, k_bias, v_bias, o_bias;
  Vector q_norm, k_norm;  // [head_dim], or [heads * head_dim]: over all heads at once
  Vector post_attn_norm;  // [n_embd], after attention, before the residual sum
  Vector ffn_norm;        // [n_embd]
  bool mixture = false;   // else dense
  Matrix gate, up, down;  // dense feed-forward
  Vector post_ffn_norm;   // [n_embd]
  Matrix router;          // [n_expert][n_embd]; none where one router serves all layers
  Vector router_bias;     // [n_expert]: added to the gates for the choice alone; empty: none
  Matrix pregate;         // [n_expert][n_embd]: chooses the next mixture layer's experts
  Vector pregate_bias;    // [n_expert]
  Matrix shared_gate, shared_up, shared_down;  // shared expert
  Matrix shared_router;  // [1][n_embd]: its sigmoid scales the shared expert; none: in full
};

// The weights that a model has once.
struct ModelWeights {
  Matrix embedding;     // [n_vocab][n_embd]; rows come from `stream` where it has no data
  Matrix output;        // [n_vocab][n_embd]; the embedding where the file has none
  Vector output_norm;   // [n_embd]
  Vector output_bias;   // [n_vocab]
  Vector rope_factors;  // [n_rot / 2] divisors of the frequencies; empty: none
  Vector rope_factors_long, rope_factors_short;
  // Routing::Where::kOnce: logits = down * relu(up * norm of the residual stream after layer 0).
  Vector router_norm;             // [n_embd]
  Matrix router_up, router_down;  // [n_router][n_embd], [n_expert][n_router]
};

}  // namespace stoker
