// OLMoE has a mixture in every layer; q and k are normalised over their whole width.
#include "runtime/arch/families.h"

namespace stoker {

namespace {

void configure(const GgufFile&, ModelConfig& c) {
  c.rope.neox = true;
  c.sliding_window = 0;
  c.routing.normalize = false;
  c.n_ff_expert = c.n_ff;
}

using namespace tensors;

constexpr LayerTensor kFullNorms[] = {
    {.name = "attn_q_norm.weight", .kind = Kind::kNorms, .rows = q, .vector = &L::q_norm},
    {.name = "attn_k_norm.weight", .kind = Kind::kNorms, .rows = k, .vector = &L::k_norm},
};
constexpr std::span<const LayerTensor> kLayers[] = {
    kAttention, kFullNorms, kFeedForwardNorm, kDense, kRouter, kExperts,
};

}  // namespace

extern const Family kFamily_olmoe = {configure, standard_layer, {kModel, kLayers}};

}  // namespace stoker
