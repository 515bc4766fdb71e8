#include "runtime/core/model/config.h"

#include <algorithm>
#include <cmath>
#include <string_view>

#include "runtime/base/errors.h"
#include "runtime/core/model/family.h"

namespace stoker {

namespace {

// Limits that no real model comes near; they keep products of sizes inside 64 bits.
constexpr int64_t kMaxSize = int64_t{1} << 24;
constexpr int64_t kMaxLayers = 4096;

struct Reader {
  const GgufFile& file;
  std::string arch;

  std::string key(const char* name) const { return arch + "." + name; }

  int64_t checked(const std::string& k, int64_t v, int64_t low, int64_t high) const {
    if (v < low || v > high) {
      throw Error(ErrorKind::kModelFile, file.path() + ": " + k + ": expected " +
                                             std::to_string(low) + " to " + std::to_string(high) +
                                             ", found " + std::to_string(v));
    }
    return v;
  }
  // Reads a size; models that give one value a layer must give the same for all layers.
  int64_t size(const char* name, int64_t fallback, int64_t low = 1, int64_t high = kMaxSize) const {
    const std::string k = key(name);
    const GgufValue* v = file.find(k);
    if (!v) {
      if (fallback < 0) file.require_int(k);
      return fallback;
    }
    if (!v->is_array()) return checked(k, file.require_int(k), low, high);
    const std::vector<int64_t> all = v->as_int_array();
    for (int64_t x : all) {
      if (x != all[0]) {
        throw Error(ErrorKind::kUnsupported,
                    file.path() + ": " + k + " differs between layers: expected one value, found " +
                        std::to_string(all[0]) + " and " + std::to_string(x));
      }
    }
    return checked(k, all.empty() ? 0 : all[0], low, high);
  }
  double number(const char* name, double fallback) const {
    const double v = file.get_float(key(name), fallback);
    if (!std::isfinite(v)) {
      throw Error(ErrorKind::kModelFile, file.path() + ": " + key(name) +
                                             ": expected a finite number, found " +
                                             std::to_string(v));
    }
    return v;
  }
};

void read_rope(const Reader& r, ModelConfig& c) {
  RopeConfig& rope = c.rope;
  rope.n_rot = r.size("rope.dimension_count", c.head_dim, 0, c.head_dim);
  rope.base = r.number("rope.freq_base", 10000.0);
  rope.base_sliding = r.number("rope.freq_base_swa", 0.0);
  rope.factor = r.number("rope.scaling.factor", r.number("rope.scale_linear", 1.0));
  if (rope.factor <= 0) rope.factor = 1.0;
  const std::string type(
      r.file.get_string(r.key("rope.scaling.type"), rope.factor == 1.0 ? "none" : "linear"));
  if (type == "none") {
    rope.scaling = RopeScaling::kNone;
    rope.factor = 1.0;
  } else if (type == "linear") {
    rope.scaling = RopeScaling::kLinear;
  } else if (type == "yarn") {
    rope.scaling = RopeScaling::kYarn;
  } else if (type == "longrope") {
    rope.scaling = RopeScaling::kLongRope;
  } else {
    throw Error(ErrorKind::kUnsupported, r.file.path() + ": " + r.key("rope.scaling.type") +
                                             ": expected none, linear, yarn or longrope, found " +
                                             type);
  }
  rope.original_context =
      r.size("rope.scaling.original_context_length", c.context_train, 1, int64_t{1} << 32);
  rope.attention_factor = r.number("rope.scaling.attn_factor", 1.0);
  rope.beta_fast = r.number("rope.scaling.yarn_beta_fast", 32.0);
  rope.beta_slow = r.number("rope.scaling.yarn_beta_slow", 1.0);
  if (rope.n_rot % 2 != 0 || rope.base <= 0) {
    throw Error(ErrorKind::kModelFile, r.file.path() + ": rotary embedding: expected an even " +
                                           "width and a positive base, found " +
                                           std::to_string(rope.n_rot) + " and " +
                                           std::to_string(rope.base));
  }
}

void read_routing(const Reader& r, ModelConfig& c) {
  Routing& routing = c.routing;
  routing.pregated = c.architecture.starts_with(kPregatedPrefix);
  routing.scale = static_cast<float>(r.number("expert_weights_scale", 1.0));
  if (routing.scale == 0) routing.scale = 1;  // as converters write that there is none
  routing.groups = r.size("expert_group_count", 1, 0, 65536);
  if (routing.groups < 2) {
    routing.groups = routing.groups_used = 1;
    return;
  }
  routing.groups_used = r.size("expert_group_used_count", routing.groups, 1, routing.groups);
  const int64_t reachable = c.n_expert / routing.groups * routing.groups_used;
  if (c.n_expert % routing.groups != 0 || c.n_expert_used > reachable) {
    throw Error(ErrorKind::kModelFile,
                r.file.path() + ": " + r.key("expert_group_count") + ": expected a divisor of " +
                    std::to_string(c.n_expert) + " experts with room for " +
                    std::to_string(c.n_expert_used) + " in the groups used, found " +
                    std::to_string(routing.groups) + " groups, " +
                    std::to_string(routing.groups_used) + " used");
  }
}

// Returns which layers have experts.
void find_mixtures(const GgufFile& file, ModelConfig& c) {
  for (int64_t il = 0; il < c.n_layer; ++il) {
    bool mixture = c.is_mixture() && il >= c.n_layer_dense;
    if (c.routing.where == Routing::Where::kOnce) {
      mixture = il > 0;
    } else if (mixture && !c.only_mixtures && c.n_layer_dense == 0) {
      mixture = file.tensor("blk." + std::to_string(il) + ".ffn_gate_inp.weight") != nullptr;
    }
    c.mixture.push_back(mixture);
  }
}

// Checks that the file names the width of each layer's feed-forward.
void check_widths(const GgufFile& file, const ModelConfig& c) {
  for (const bool mixture : c.mixture) {
    if ((mixture ? c.n_ff_expert : c.n_ff) > 0) continue;
    const std::string key =
        c.architecture + (mixture ? ".expert_feed_forward_length" : ".feed_forward_length");
    throw Error(ErrorKind::kModelFile, file.path() + ": " + key + ": expected at least 1, found " +
                                           (file.find(key) ? "0" : "none"));
  }
}

}  // namespace

ModelConfig read_config(const GgufFile& file) {
  ModelConfig c;
  c.architecture = std::string(file.require_string("general.architecture"));
  c.name = std::string(file.get_string("general.name", ""));
  const Reader r{file, c.architecture};
  c.n_layer = r.size("block_count", -1, 1, kMaxLayers);
  c.n_layer_ignored = r.size("nextn_predict_layers", 0, 0, c.n_layer - 1);
  c.n_layer -= c.n_layer_ignored;
  c.n_embd = r.size("embedding_length", -1);
  c.n_head = r.size("attention.head_count", -1, 1, 4096);
  c.n_head_kv = r.size("attention.head_count_kv", c.n_head, 1, 4096);
  if (c.n_head % c.n_head_kv != 0) {
    throw Error(ErrorKind::kModelFile, file.path() + ": attention heads: expected a multiple of " +
                                           std::to_string(c.n_head_kv) + " KV heads, found " +
                                           std::to_string(c.n_head));
  }
  c.head_dim = r.size("attention.key_length", c.n_embd / c.n_head, 1, 65536);
  c.head_dim_v = r.size("attention.value_length", c.n_embd / c.n_head, 1, 65536);
  c.n_ff = r.size("feed_forward_length", 0, 0);
  c.context_train = r.size("context_length", -1, 1, int64_t{1} << 32);
  file.require_float(r.key("attention.layer_norm_rms_epsilon"));
  c.norm_eps = static_cast<float>(r.number("attention.layer_norm_rms_epsilon", 0));
  read_rope(r, c);

  c.attention_scale = static_cast<float>(r.number("attention.scale", 0.0));
  if (c.attention_scale == 0) {
    c.attention_scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
  }
  c.attention_softcap = static_cast<float>(r.number("attn_logit_softcapping", 0.0));
  c.final_softcap = static_cast<float>(r.number("final_logit_softcapping", 0.0));
  c.causal = file.get_bool(r.key("attention.causal"), true);
  c.sliding_window = r.size("attention.sliding_window", 0, 0, int64_t{1} << 32);
  c.sliding.assign(static_cast<size_t>(c.n_layer), false);
  c.rotates.assign(static_cast<size_t>(c.n_layer), c.rope.n_rot > 0);

  c.n_expert = r.size("expert_count", 0, 0, 65536);
  c.n_expert_used = r.size("expert_used_count", 0, 0, 65536);
  if (c.n_expert > 0 && (c.n_expert_used < 1 || c.n_expert_used > c.n_expert)) {
    throw Error(ErrorKind::kModelFile, file.path() + ": expert_used_count: expected 1 to " +
                                           std::to_string(c.n_expert) + ", found " +
                                           std::to_string(c.n_expert_used));
  }
  c.n_ff_expert = r.size("expert_feed_forward_length", c.n_ff, 0);
  if (c.n_expert > 0) c.n_layer_dense = r.size("leading_dense_block_count", 0, 0, c.n_layer);
  const int64_t gating = file.get_int(r.key("expert_gating_func"), 0);
  if (gating < 0 || gating > 2) {
    throw Error(ErrorKind::kUnsupported, file.path() + ": " + r.key("expert_gating_func") +
                                             ": expected 1 (softmax) or 2 (sigmoid), found " +
                                             std::to_string(gating));
  }
  if (gating == 2) c.routing.gating = Gating::kSigmoid;
  read_routing(r, c);
  if (c.routing.pregated && c.n_expert == 0) {
    throw Error(ErrorKind::kModelFile, file.path() + ": " + r.key("expert_count") +
                                           ": expected at least 1 in a pre-gated model, found 0");
  }

  const GgufTensor& embedding = file.require_tensor("token_embd.weight");
  c.n_vocab = embedding.ne[1];
  if (embedding.ne[0] != c.n_embd) {
    throw Error(ErrorKind::kModelFile, file.path() + ": token_embd.weight: expected rows of " +
                                           std::to_string(c.n_embd) + " values, found " +
                                           std::to_string(embedding.ne[0]));
  }
  // More rows than tokens are padding; a token without a row could not be evaluated.
  const GgufValue* tokens = file.find("tokenizer.ggml.tokens");
  if (tokens && tokens->is_array() && tokens->size() > static_cast<uint64_t>(c.n_vocab)) {
    throw Error(ErrorKind::kModelFile, file.path() + ": tokenizer.ggml.tokens: expected at most " +
                                           std::to_string(c.n_vocab) +
                                           " (the rows of token_embd.weight), found " +
                                           std::to_string(tokens->size()));
  }
  return c;
}

int64_t shared_width(const GgufFile& file, const ModelConfig& c) {
  const Reader r{file, c.architecture};
  const int64_t width = r.size("expert_shared_feed_forward_length", 0, 0);
  return width > 0 ? width : r.size("expert_shared_count", 0, 0, 1024) * c.n_ff_expert;
}

void finish_config(const GgufFile& file, ModelConfig& c) {
  c.routing.normalize = file.get_bool(c.architecture + ".expert_weights_norm", c.routing.normalize);
  find_mixtures(file, c);
  check_widths(file, c);
  if (!c.causal && std::find(c.sliding.begin(), c.sliding.end(), true) != c.sliding.end()) {
    throw Error(ErrorKind::kUnsupported, file.path() + ": " + c.architecture +
                                             ".attention.causal: expected true in a model with "
                                             "sliding windows, found false");
  }
}

KvShape kv_shape(const ModelConfig& c) {
  KvShape shape{c.n_head_kv, c.head_dim, c.head_dim_v, {}};
  for (int64_t il = 0; il < c.n_layer; ++il) {
    const bool windowed = c.causal && c.sliding[static_cast<size_t>(il)];
    shape.window.push_back(windowed ? c.sliding_window : 0);
  }
  return shape;
}

}  // namespace stoker
