// The families Qwen 2, 2 MoE (with a shared expert), 3 and 3 MoE. Their other differences (biases,
// norms of q and k) are in the tensors that a file holds.
#include "runtime/arch/families.h"

namespace stoker {

namespace {

void qwen(const GgufFile& file, ModelConfig& c, bool normalize) {
  c.rope.neox = true;
  c.sliding_window = 0;  // files carry the key, but the models' attention has no window
  c.routing.normalize = normalize;
  const std::string key = c.architecture + ".expert_feed_forward_length";
  if (c.is_mixture() && file.get_int(key, 0) == 0) c.n_ff_expert = c.n_ff / c.n_expert_used;
}

void configure_dense(const GgufFile& file, ModelConfig& c) { qwen(file, c, true); }

void configure_qwen2moe(const GgufFile& file, ModelConfig& c) {
  qwen(file, c, false);
  c.n_ff_shared = file.get_int(c.architecture + ".expert_shared_feed_forward_length", 0);
  if (c.n_ff_shared == 0) c.n_ff_shared = c.n_ff;
}

void configure_qwen3moe(const GgufFile& file, ModelConfig& c) { qwen(file, c, true); }

using namespace tensors;

constexpr LayerTensor kSharedRouter[] = {
    // The file stores it as a vector [n_embd].
    {.name = "ffn_gate_inp_shexp.weight",
     .kind = Kind::kRouters,
     .rows = one_if_shared,
     .cols = embd,
     .matrix = &L::shared_router,
     .layers = Layers::kMixture},
};
constexpr std::span<const LayerTensor> kQwen2MoeLayers[] = {
    kAttention, kFeedForwardNorm, kDense, kRouter, kExperts, kSharedExpert, kSharedRouter,
};

}  // namespace

extern const Family kFamily_qwen2 = {configure_dense, standard_layer, kStandard};
extern const Family kFamily_qwen3 = {configure_dense, standard_layer, kWithHeadNorms};
extern const Family kFamily_qwen2moe = {
    configure_qwen2moe, standard_layer, {kModel, kQwen2MoeLayers}};
extern const Family kFamily_qwen3moe = {configure_qwen3moe, standard_layer, kWithHeadNorms};

}  // namespace stoker
