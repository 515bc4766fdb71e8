// A dense Llama that `stoker export refactor` has split into experts (Read-ME's idea). The first
// layer is dense; after it one small router chooses the experts of the token in all other layers at
// once, so that all reads are known before the second layer. Experts count in full, beside a shared
// expert of the common channels.
#include "runtime/arch/families.h"
#include "runtime/base/errors.h"

namespace stoker {

namespace {

void configure(const GgufFile& file, ModelConfig& c) {
  c.sliding_window = 0;
  c.routing.where = Routing::Where::kOnce;
  c.routing.gating = Gating::kUnit;
  const auto size = [&](const char* name, int64_t low, int64_t high) {
    const std::string key = c.architecture + "." + name;
    const int64_t v = file.require_int(key);
    if (v < low || v > high) {
      throw Error(ErrorKind::kModelFile, file.path() + ": " + key + ": expected " +
                                             std::to_string(low) + " to " + std::to_string(high) +
                                             ", found " + std::to_string(v));
    }
    return v;
  };
  // The hidden values of the router and of the shared expert use the scratch of the dense layer.
  constexpr int64_t kMost = int64_t{1} << 24;
  size("block_count", 2, 4096);
  size("expert_count", 1, 65536);
  size("feed_forward_length", 1, kMost);
  c.n_ff_expert = size("expert_feed_forward_length", 1, kMost);
  c.n_ff_shared = size("expert_shared_feed_forward_length", 0, kMost);
  c.routing.n_hidden = size("router_length", 1, c.n_ff);
}

void layer(Forward& f, int64_t il) {
  const LayerWeights& w = f.layer(il);
  f.norm(f.x(), w.attn_norm, f.a());
  f.attention(il, f.a(), f.b());
  f.add(f.x(), f.b());
  f.norm(f.x(), w.ffn_norm, f.a());
  if (il == 0) {
    f.feed_forward(il, f.a(), f.b());
  } else {
    f.mixture(il, f.a(), f.routes_kept(), f.b());
  }
  f.add(f.x(), f.b());
  if (il == 0) f.route_once();
}

using namespace tensors;

int64_t hidden(const ModelConfig& c) { return c.routing.n_hidden; }

constexpr ModelTensor kOneRouter[] = {
    {.name = "router_norm.weight", .kind = Kind::kRouters, .rows = embd, .vector = &M::router_norm},
    {.name = "router_up.weight",
     .kind = Kind::kRouters,
     .rows = hidden,
     .cols = embd,
     .matrix = &M::router_up,
     .two_term = true},
    {.name = "router_down.weight",
     .kind = Kind::kRouters,
     .rows = experts,
     .cols = hidden,
     .matrix = &M::router_down,
     .two_term = true},
};
constexpr std::span<const ModelTensor> kModelAndRouter[] = {kModelTensors, kOneRouter};
constexpr std::span<const LayerTensor> kLayers[] = {
    kAttention, kFeedForwardNorm, kDense, kExperts, kSharedExpert,
};

}  // namespace

extern const Family kFamily_token_routed = {configure, layer, {kModelAndRouter, kLayers}};

}  // namespace stoker
