// Gemma 3 has scaled embeddings, norms before and after each block, five sliding-window layers to
// each global one, and GELU.
#include <cmath>

#include "runtime/arch/families.h"
#include "runtime/arch/sliding_pattern.h"

namespace stoker {

namespace {

void configure(const GgufFile& file, ModelConfig& c) {
  c.rope.neox = true;
  c.n_expert = 0;  // the family is dense: a router in the file is refused as unknown
  if (c.rope.base_sliding == 0) c.rope.base_sliding = 10000.0;
  c.activation = Activation::kGelu;
  c.embedding_scale = std::sqrt(static_cast<float>(c.n_embd));
  if (c.n_layer == 62) {  // the 27B model scales by its nominal head width
    c.attention_scale = 1.0f / std::sqrt(static_cast<float>(c.n_embd / c.n_head));
  }
  set_sliding_layers(file, c, 6, false);
}

void layer(Forward& f, int64_t il) {
  const LayerWeights& w = f.layer(il);
  f.norm(f.x(), w.attn_norm, f.a());
  f.attention(il, f.a(), f.b());
  f.norm(f.b(), w.post_attn_norm, f.b());
  f.add(f.x(), f.b());
  f.norm(f.x(), w.ffn_norm, f.a());
  f.feed_forward(il, f.a(), f.b());
  f.norm(f.b(), w.post_ffn_norm, f.b());
  f.add(f.x(), f.b());
}

using namespace tensors;

constexpr LayerTensor kPostNorms[] = {
    {.name = "post_attention_norm.weight",
     .kind = Kind::kNorms,
     .rows = embd,
     .vector = &L::post_attn_norm},
    {.name = "post_ffw_norm.weight",
     .kind = Kind::kNorms,
     .rows = embd,
     .vector = &L::post_ffn_norm},
};
constexpr std::span<const LayerTensor> kLayers[] = {
    kAttention, kHeadNorms, kFeedForwardNorm, kDense, kPostNorms,
};

}  // namespace

extern const Family kFamily_gemma3 = {configure, layer, {kModel, kLayers}};

}  // namespace stoker
