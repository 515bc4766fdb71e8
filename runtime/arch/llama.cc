// Llama has dense layers, or mixtures in Mixtral's form (a softmax over all experts, then the used
// ones are renormalised).
#include "runtime/arch/families.h"

namespace stoker {

void standard_layer(Forward& f, int64_t il) {
  const LayerWeights& w = f.layer(il);
  f.norm(f.x(), w.attn_norm, f.a());
  f.attention(il, f.a(), f.b());
  f.add(f.x(), f.b());
  f.norm(f.x(), w.ffn_norm, f.a());
  if (w.mixture) {
    f.mixture(il, f.a(), f.route(il, f.a()), f.b());
  } else {
    f.feed_forward(il, f.a(), f.b());
  }
  f.add(f.x(), f.b());
}

namespace {

void configure(const GgufFile&, ModelConfig& c) {
  c.sliding_window = 0;  // Mistral files carry the key; the models were trained without a window
  c.routing.normalize = true;
  c.n_ff_expert = c.n_ff;
}

}  // namespace

extern const Family kFamily_llama = {configure, standard_layer, tensors::kStandard};

}  // namespace stoker
