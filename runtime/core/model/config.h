// What a model is: sizes, norms, rotary embedding, attention, mixture. Read from GGUF metadata,
// completed by the family (runtime/arch) and immutable afterwards.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "runtime/core/model/routing.h"
#include "runtime/gguf/gguf.h"
#include "kernels_cpu/ops/ops.h"
#include "runtime/kv/kv_shape.h"

namespace stoker {

enum class RopeScaling { kNone, kLinear, kYarn, kLongRope };

struct RopeConfig {
  int64_t n_rot = 0;  // rotated values of a head; 0: no rotation
  bool neox = false;  // pairs (i, i + n_rot / 2) instead of (2i, 2i + 1)
  double base = 10000.0;
  double base_sliding = 0;  // base of sliding-window layers, unscaled; 0: as the others
  RopeScaling scaling = RopeScaling::kNone;
  double factor = 1.0;            // positions are divided by it
  int64_t original_context = 0;   // context before scaling (yarn, longrope)
  double attention_factor = 1.0;  // multiplies cos and sin
  double beta_fast = 32.0;        // yarn
  double beta_slow = 1.0;
};

struct ModelConfig {
  std::string architecture;
  std::string name;
  int64_t n_layer = 0;
  int64_t n_embd = 0;
  int64_t n_vocab = 0;
  int64_t n_head = 0;
  int64_t n_head_kv = 0;
  int64_t head_dim = 0;    // of queries and keys
  int64_t head_dim_v = 0;  // of values
  int64_t n_ff = 0;        // dense feed-forward width; 0 where every layer is a mixture
  int64_t context_train = 0;
  float norm_eps = 1e-5f;
  RopeConfig rope;

  float attention_scale = 0;    // of q . k
  float attention_softcap = 0;  // 0: none
  bool causal = true;           // false: tokens attend to later ones too (encoders of texts)
  float final_softcap = 0;
  float embedding_scale = 1;
  Activation activation = Activation::kSilu;
  int64_t sliding_window = 0;   // 0: none
  std::vector<bool> sliding;    // [n_layer] layers that use the window
  std::vector<bool> rotates;    // [n_layer] layers with rotary embedding
  int64_t n_layer_ignored = 0;  // of the file, after n_layer: they predict further tokens
  int64_t n_layer_dense = 0;    // first layers of a mixture that are dense
  bool only_mixtures = false;   // every layer is a mixture
  std::vector<bool> mixture;    // [n_layer] layers with experts

  int64_t n_expert = 0;  // 0: dense
  int64_t n_expert_used = 0;
  int64_t n_ff_expert = 0;
  int64_t n_ff_shared = 0;  // width of the shared expert; 0: none
  Routing routing;

  bool is_mixture() const { return n_expert > 0; }
};

// Returns the shape of what the model's layers keep of a token.
KvShape kv_shape(const ModelConfig& c);

// Reads the keys that every family shares; throws Error(kModelFile) where one is missing or
// makes no sense.
ModelConfig read_config(const GgufFile& file);
// Returns the width of the shared experts together, in either form of the file; 0: none.
int64_t shared_width(const GgufFile& file, const ModelConfig& c);
// Applies what the file says over the family's defaults, and checks the result. Throws
// Error: kUnsupported, kModelFile.
void finish_config(const GgufFile& file, ModelConfig& c);

}  // namespace stoker
