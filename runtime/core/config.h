// What a model is: sizes, norms, rotary embedding, attention, mixture. Read from GGUF metadata,
// completed by the family (runtime/arch) and immutable afterwards.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "runtime/gguf/gguf.h"
#include "kernels_cpu/ops/ops.h"
#include "runtime/kv/kv_cache.h"

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

enum class Gating {
  kSoftmax,
  kSigmoid,
  kUnit,  // the used experts count in full
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
  int64_t sliding_window = 0;  // 0: none
  std::vector<bool> sliding;   // [n_layer] layers that use the window
  std::vector<bool> rotates;   // [n_layer] layers with rotary embedding
  bool qk_norm = false;        // q and k are normalised
  bool post_norms = false;     // norms after attention and feed-forward
  bool routed = false;         // every layer is a mixture
  bool routes_early = false;   // routers read a layer's raw input, before attention
  // A layer's experts are chosen at the mixture layer before it, out of what its router reads; the
  // layer's own router weighs them. The first one's router does both.
  bool pregated = false;
  bool routes_once = false;   // one router after the first layer, which is dense, for all others
  bool qk_norm_full = false;  // q and k normalised over all heads at once, not each head

  int64_t n_expert = 0;  // 0: dense
  int64_t n_expert_used = 0;
  int64_t n_ff_expert = 0;
  int64_t n_ff_shared = 0;  // width of the shared expert; 0: none
  int64_t n_router = 0;     // hidden width of the router of routes_once
  Gating gating = Gating::kSoftmax;
  bool normalize_experts = false;  // used experts' weights divided by their sum

  bool is_mixture() const { return n_expert > 0; }
};

inline KvShape kv_shape(const ModelConfig& c) {
  return {c.n_layer, c.n_head_kv, c.head_dim, c.head_dim_v};
}

// Reads the keys that every family shares; throws Error(kModelFile) where one is missing or
// makes no sense.
ModelConfig read_config(const GgufFile& file);
// What the file says against the family's own; checks of what both together make.
// Throws Error(kUnsupported).
void finish_config(const GgufFile& file, ModelConfig& c);

}  // namespace stoker
