// The tensors that several families share, by subject. A family's table is a list of these and of
// its own tensors; the names are GGUF's.
#pragma once

#include "runtime/core/model/tensor_row.h"

namespace stoker::tensors {

using L = LayerWeights;
using M = ModelWeights;
using Kind = TensorKind;
using Role = TensorRole;
using Layers = TensorLayers;

// These functions give the sizes that the tables below refer to.
inline int64_t embd(const ModelConfig& c) { return c.n_embd; }
inline int64_t vocab(const ModelConfig& c) { return c.n_vocab; }
inline int64_t q(const ModelConfig& c) { return c.n_head * c.head_dim; }
inline int64_t k(const ModelConfig& c) { return c.n_head_kv * c.head_dim; }
inline int64_t v(const ModelConfig& c) { return c.n_head_kv * c.head_dim_v; }
inline int64_t o(const ModelConfig& c) { return c.n_head * c.head_dim_v; }
inline int64_t qkv(const ModelConfig& c) { return q(c) + k(c) + v(c); }
inline int64_t zero(const ModelConfig&) { return 0; }
inline int64_t qk(const ModelConfig& c) { return q(c) + k(c); }
inline int64_t head(const ModelConfig& c) { return c.head_dim; }
inline int64_t ff(const ModelConfig& c) { return c.n_ff; }
inline int64_t ff_expert(const ModelConfig& c) { return c.n_ff_expert; }
inline int64_t ff_shared(const ModelConfig& c) { return c.n_ff_shared; }
inline int64_t one_if_shared(const ModelConfig& c) { return c.n_ff_shared > 0 ? 1 : 0; }
inline int64_t experts(const ModelConfig& c) { return c.n_expert; }
inline int64_t pairs(const ModelConfig& c) { return c.rope.n_rot / 2; }
inline int64_t long_pairs(const ModelConfig& c) {
  return c.rope.scaling == RopeScaling::kLongRope ? pairs(c) : 0;
}

constexpr ModelTensor kModelTensors[] = {
    {.name = "token_embd.weight",
     .kind = Kind::kEmbeddings,
     .rows = vocab,
     .cols = embd,
     .matrix = &M::embedding,
     .role = Role::kLookup,
     .two_term = true},
    {.name = "output.weight",
     .kind = Kind::kOutput,
     .rows = vocab,
     .cols = embd,
     .matrix = &M::output,
     .role = Role::kStreamed,
     .optional = true,  // the embedding where the file has none
     .two_term = true},
    {.name = "output_norm.weight", .kind = Kind::kNorms, .rows = embd, .vector = &M::output_norm},
    {.name = "output.bias",
     .kind = Kind::kOutput,
     .rows = vocab,
     .vector = &M::output_bias,
     .optional = true},
    {.name = "rope_freqs.weight",
     .kind = Kind::kOther,
     .rows = pairs,
     .vector = &M::rope_factors,
     .optional = true},
    {.name = "rope_factors_long.weight",
     .kind = Kind::kOther,
     .rows = long_pairs,
     .vector = &M::rope_factors_long},
    {.name = "rope_factors_short.weight",
     .kind = Kind::kOther,
     .rows = long_pairs,
     .vector = &M::rope_factors_short},
};

constexpr std::span<const ModelTensor> kModel[] = {kModelTensors};

// The norm, the projections, and the biases where the file has them.
constexpr LayerTensor kAttention[] = {
    {.name = "attn_norm.weight", .kind = Kind::kNorms, .rows = embd, .vector = &L::attn_norm},
    {.name = "attn_q.weight",
     .kind = Kind::kAttention,
     .rows = q,
     .cols = embd,
     .matrix = &L::q,
     .role = Role::kStreamed,
     .two_term = true,
     .joined = "attn_qkv.weight",
     .joined_begin = zero,
     .joined_rows = qkv},
    {.name = "attn_k.weight",
     .kind = Kind::kAttention,
     .rows = k,
     .cols = embd,
     .matrix = &L::k,
     .role = Role::kStreamed,
     .two_term = true,
     .joined = "attn_qkv.weight",
     .joined_begin = q,
     .joined_rows = qkv},
    {.name = "attn_v.weight",
     .kind = Kind::kAttention,
     .rows = v,
     .cols = embd,
     .matrix = &L::v,
     .role = Role::kStreamed,
     .two_term = true,
     .joined = "attn_qkv.weight",
     .joined_begin = qk,
     .joined_rows = qkv},
    {.name = "attn_output.weight",
     .kind = Kind::kAttention,
     .rows = embd,
     .cols = o,
     .matrix = &L::o,
     .role = Role::kStreamed},
    {.name = "attn_q.bias",
     .kind = Kind::kAttention,
     .rows = q,
     .vector = &L::q_bias,
     .optional = true},
    {.name = "attn_k.bias",
     .kind = Kind::kAttention,
     .rows = k,
     .vector = &L::k_bias,
     .optional = true},
    {.name = "attn_v.bias",
     .kind = Kind::kAttention,
     .rows = v,
     .vector = &L::v_bias,
     .optional = true},
    {.name = "attn_output.bias",
     .kind = Kind::kAttention,
     .rows = embd,
     .vector = &L::o_bias,
     .optional = true},
};

// The norms of q and k, head by head.
constexpr LayerTensor kHeadNorms[] = {
    {.name = "attn_q_norm.weight", .kind = Kind::kNorms, .rows = head, .vector = &L::q_norm},
    {.name = "attn_k_norm.weight", .kind = Kind::kNorms, .rows = head, .vector = &L::k_norm},
};

constexpr LayerTensor kFeedForwardNorm[] = {
    {.name = "ffn_norm.weight", .kind = Kind::kNorms, .rows = embd, .vector = &L::ffn_norm},
};

constexpr LayerTensor kDense[] = {
    {.name = "ffn_gate.weight",
     .kind = Kind::kFeedForward,
     .rows = ff,
     .cols = embd,
     .matrix = &L::gate,
     .role = Role::kStreamed,
     .layers = Layers::kDense},
    {.name = "ffn_up.weight",
     .kind = Kind::kFeedForward,
     .rows = ff,
     .cols = embd,
     .matrix = &L::up,
     .role = Role::kStreamed,
     .layers = Layers::kDense},
    {.name = "ffn_down.weight",
     .kind = Kind::kFeedForward,
     .rows = embd,
     .cols = ff,
     .matrix = &L::down,
     .role = Role::kStreamed,
     .layers = Layers::kDense},
};

constexpr LayerTensor kRouter[] = {
    {.name = "ffn_gate_inp.weight",
     .kind = Kind::kRouters,
     .rows = experts,
     .cols = embd,
     .matrix = &L::router,
     .layers = Layers::kMixture,
     .two_term = true},
};

// One tensor holds all experts; in older files each has its own: "ffn_gate.<expert>.weight".
constexpr LayerTensor kExperts[] = {
    {.name = "ffn_gate_exps.weight",
     .kind = Kind::kExperts,
     .rows = ff_expert,
     .cols = embd,
     .role = Role::kExpert,
     .layers = Layers::kMixture},
    {.name = "ffn_up_exps.weight",
     .kind = Kind::kExperts,
     .rows = ff_expert,
     .cols = embd,
     .role = Role::kExpert,
     .layers = Layers::kMixture},
    {.name = "ffn_down_exps.weight",
     .kind = Kind::kExperts,
     .rows = embd,
     .cols = ff_expert,
     .role = Role::kExpert,
     .layers = Layers::kMixture},
};

constexpr LayerTensor kSharedExpert[] = {
    {.name = "ffn_gate_shexp.weight",
     .kind = Kind::kSharedExperts,
     .rows = ff_shared,
     .cols = embd,
     .matrix = &L::shared_gate,
     .role = Role::kStreamed,
     .layers = Layers::kMixture},
    {.name = "ffn_up_shexp.weight",
     .kind = Kind::kSharedExperts,
     .rows = ff_shared,
     .cols = embd,
     .matrix = &L::shared_up,
     .role = Role::kStreamed,
     .layers = Layers::kMixture},
    {.name = "ffn_down_shexp.weight",
     .kind = Kind::kSharedExperts,
     .rows = embd,
     .cols = ff_shared,
     .matrix = &L::shared_down,
     .role = Role::kStreamed,
     .layers = Layers::kMixture},
};

// The tensors that most families have.
constexpr std::span<const LayerTensor> kStandardLayers[] = {
    kAttention, kFeedForwardNorm, kDense, kRouter, kExperts,
};
constexpr TensorTable kStandard = {kModel, kStandardLayers};
constexpr std::span<const LayerTensor> kHeadNormLayers[] = {
    kAttention, kHeadNorms, kFeedForwardNorm, kDense, kRouter, kExperts,
};
constexpr TensorTable kWithHeadNorms = {kModel, kHeadNormLayers};

}  // namespace stoker::tensors
