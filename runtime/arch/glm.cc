// GLM-4.5 has leading dense layers, then mixtures with a shared expert that always counts in full.
// The gates are sigmoids with a bias for the choice alone, the weights of the chosen experts are
// scaled, and half of each head is rotated.
#include "runtime/arch/families.h"

namespace stoker {

namespace {

void configure(const GgufFile& file, ModelConfig& c) {
  c.rope.neox = true;
  c.sliding_window = 0;
  if (file.get_int(c.architecture + ".expert_gating_func", 0) == 0) {
    c.routing.gating = Gating::kSigmoid;
  }
  c.n_ff_shared = shared_width(file, c);
}

using namespace tensors;

constexpr LayerTensor kNorms[] = {
    // In the file, the norm before the feed-forward has the name that others give to one after it.
    {.name = "post_attention_norm.weight",
     .kind = Kind::kNorms,
     .rows = embd,
     .vector = &L::ffn_norm},
    {.name = "attn_q_norm.weight",
     .kind = Kind::kNorms,
     .rows = head,
     .vector = &L::q_norm,
     .optional = true},
    {.name = "attn_k_norm.weight",
     .kind = Kind::kNorms,
     .rows = head,
     .vector = &L::k_norm,
     .optional = true},
};
constexpr LayerTensor kBias[] = {
    {.name = "exp_probs_b.bias",
     .kind = Kind::kRouters,
     .rows = experts,
     .vector = &L::router_bias,
     .layers = Layers::kMixture,
     .optional = true},
};
constexpr std::span<const LayerTensor> kLayers[] = {
    kAttention, kNorms, kDense, kRouter, kBias, kExperts, kSharedExpert,
};

}  // namespace

extern const Family kFamily_glm4moe = {configure, standard_layer, {kModel, kLayers}};

}  // namespace stoker
