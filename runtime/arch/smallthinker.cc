// SmallThinker's router sees the layer's raw input, before attention, so that experts are known
// early. The experts are ReGLU; in models with a sliding window each fourth layer is global and
// unrotated.
#include "runtime/arch/families.h"
#include "runtime/arch/sliding_pattern.h"

namespace stoker {

namespace {

constexpr int64_t kPeriod = 4;

void configure(const GgufFile& file, ModelConfig& c) {
  c.rope.neox = true;
  c.activation = Activation::kRelu;
  c.routing.normalize = true;
  c.only_mixtures = true;
  c.routing.where = Routing::Where::kLayerInput;
  if (!c.is_mixture()) {
    throw Error(ErrorKind::kModelFile, file.path() + ": " + c.architecture +
                                           ".expert_count: expected at least 1, found 0");
  }
  const std::string key = c.architecture + ".expert_gating_func";
  if (file.require_int(key) == 0) {
    throw Error(ErrorKind::kUnsupported,
                file.path() + ": " + key + ": expected 1 (softmax) or 2 (sigmoid), found 0");
  }
  set_sliding_layers(file, c, kPeriod, true);
  if (c.sliding_window == 0) return;
  for (int64_t il = 0; il < c.n_layer; il += kPeriod) c.rotates[static_cast<size_t>(il)] = false;
}

void layer(Forward& f, int64_t il) {
  const LayerWeights& w = f.layer(il);
  const Routes routes = f.route(il, f.x());
  f.norm(f.x(), w.attn_norm, f.a());
  f.attention(il, f.a(), f.b());
  f.add(f.x(), f.b());
  f.norm(f.x(), w.ffn_norm, f.a());
  f.mixture(il, f.a(), routes, f.b());
  f.add(f.x(), f.b());
}

}  // namespace

extern const Family kFamily_smallthinker = {configure, layer, tensors::kStandard};

}  // namespace stoker
