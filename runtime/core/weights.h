// The weights that stay in memory: matrices as views into loaded shards, norms and biases as f32.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "offload/expert_store.h"
#include "runtime/core/config.h"
#include "runtime/core/gguf.h"

namespace stoker {

using Vector = std::vector<float>;  // a norm's weight or a bias; empty: none

struct LayerWeights {
  Vector attn_norm;   // [n_embd]
  Matrix q, k, v, o;  // [heads * head_dim][n_embd]; o: [n_embd][n_head * head_dim_v]
  Vector q_bias, k_bias, v_bias, o_bias;
  Vector q_norm, k_norm;  // [head_dim], or [heads * head_dim] with qk_norm_full
  Vector post_attn_norm;  // [n_embd], after attention, before the residual sum
  Vector ffn_norm;        // [n_embd]
  Matrix gate, up, down;  // dense feed-forward
  Vector post_ffn_norm;   // [n_embd]
  Matrix router;          // [n_expert][n_embd]
  Matrix shared_gate, shared_up, shared_down;  // shared expert
  Matrix shared_router;                        // [1][n_embd]: its sigmoid scales the shared expert
};

// Bytes of a whole file in memory of our own: the weights cannot change or vanish under a running
// model as those of a mapped file can.
class ShardMemory {
 public:
  // Reads [begin, file size) of `path` on `threads` threads. Throws Error(kModelFile).
  ShardMemory(const std::string& path, uint64_t begin, uint64_t file_size, int threads);
  ~ShardMemory();
  ShardMemory(const ShardMemory&) = delete;
  ShardMemory& operator=(const ShardMemory&) = delete;
  // Byte `offset` of the file.
  const uint8_t* at(uint64_t offset) const { return base_ + (offset - begin_); }

 private:
  uint8_t* base_ = nullptr;
  uint64_t begin_ = 0;
  uint64_t size_ = 0;
};

struct Weights {
  Matrix embedding;     // [n_vocab][n_embd]
  Matrix output;        // [n_vocab][n_embd]; the embedding where the file has none
  Vector output_norm;   // [n_embd]
  Vector output_bias;   // [n_vocab]
  Vector rope_factors;  // [n_rot / 2] divisors of the frequencies; empty: none
  Vector rope_factors_long, rope_factors_short;
  std::vector<LayerWeights> layers;
  std::unique_ptr<ExpertStore> experts;  // null for dense models
  std::vector<std::unique_ptr<ShardMemory>> shards;

  int64_t resident_bytes = 0;  // of the loaded shards
  int64_t token_bytes = 0;     // weight bytes that one decoded token reads
  int64_t layer_macs = 0;      // multiplications by weights of one token, output excluded
};

Weights load_weights(const GgufFile& file, const ModelConfig& config, int threads);

}  // namespace stoker
