// The weights: matrices as views into loaded shards, norms and biases as f32.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "offload/units/expert_store.h"
#include "offload/flash_experts.h"
#include "offload/weight_stream.h"
#include "runtime/core/config.h"
#include "runtime/gguf/gguf.h"
#include "runtime/base/memory.h"

namespace stoker {

using Vector = std::vector<float>;  // a norm's weight or a bias; empty: none

struct LayerWeights {
  Vector attn_norm;   // [n_embd]
  Matrix q, k, v, o;  // [heads * head_dim][n_embd]; o: [n_embd][n_head * head_dim_v]
  Vector q_bias, k_bias, v_bias, o_bias;
  Vector q_norm, k_norm;  // [head_dim], or [heads * head_dim] with qk_norm_full
  Vector post_attn_norm;  // [n_embd], after attention, before the residual sum
  Vector ffn_norm;        // [n_embd]
  bool mixture = false;   // else dense
  Matrix gate, up, down;  // dense feed-forward
  Vector post_ffn_norm;   // [n_embd]
  Matrix router;          // [n_expert][n_embd]; none with routes_once
  Matrix pregate;         // [n_expert][n_embd]: chooses the next mixture layer's experts
  Vector pregate_bias;    // [n_expert]
  Matrix shared_gate, shared_up, shared_down;  // shared expert
  Matrix shared_router;  // [1][n_embd]: its sigmoid scales the shared expert; none: in full
};

// Weights in memory of our own: they cannot change or vanish under a running model as those of a
// mapped file can. Of each shard a whole file's data section, or (experts on flash) the tensors
// that stay.
class TensorMemory {
 public:
  // Reads the data section of every shard on `threads` threads. Throws Error(kModelFile).
  TensorMemory(const GgufFile& file, int threads);
  // Bytes that the first form takes.
  static int64_t nbytes(const GgufFile& file);
  // Reads the given tensors only, page-aligned as direct I/O delivers them.
  TensorMemory(const std::vector<const GgufTensor*>& tensors, FlashReader& reader,
               const std::function<void()>& poll);
  // Bytes that the second form takes.
  static int64_t nbytes(const std::vector<const GgufTensor*>& tensors);

  const uint8_t* data(const GgufTensor& t) const;
  int64_t nbytes() const { return nbytes_; }

 private:
  struct Shard {
    HugeMemory memory;
    uint64_t begin = 0;  // offset in the file of the memory's first byte
  };
  std::vector<Shard> shards_;
  HugeMemory kept_;
  std::unordered_map<const GgufTensor*, const uint8_t*> at_;  // in kept_
  int64_t nbytes_ = 0;
};

struct Weights {
  Matrix embedding;     // [n_vocab][n_embd]; rows come from `stream` where it has no data
  Matrix output;        // [n_vocab][n_embd]; the embedding where the file has none
  Vector output_norm;   // [n_embd]
  Vector output_bias;   // [n_vocab]
  Vector rope_factors;  // [n_rot / 2] divisors of the frequencies; empty: none
  Vector rope_factors_long, rope_factors_short;
  // With routes_once: logits = down * relu(up * norm of the residual stream after layer 0).
  Vector router_norm;             // [n_embd]
  Matrix router_up, router_down;  // [n_router][n_embd], [n_expert][n_router]
  std::vector<LayerWeights> layers;
  std::unique_ptr<ExpertStore> experts;  // null for dense models
  FlashExperts* flash = nullptr;         // `experts`, where they are on flash
  std::unique_ptr<WeightStream> stream;  // of matrices without data; null: there are none
  std::unique_ptr<TensorMemory> memory;
};

// Products of one decoded token with weights of one format.
struct OpCost {
  enum class Part { kLayers, kExperts, kOutput };  // of mixtures: the experts used, on average
  Part part = Part::kLayers;
  const Format* format = nullptr;
  bool balanced = false;  // two terms of activations at Precision::kBalanced (engine.h)
  int64_t products = 0;   // matrices
  int64_t weights = 0;    // multiply-adds
  int64_t bytes = 0;
};

// Everything in memory.
Weights load_weights(const GgufFile& file, const ModelConfig& config, int threads);

// Which tensors of a mixture are experts, where each expert lies, which tensors stay in memory, and
// what a token multiplies with; from the header alone. A dense model has no experts.
struct Partition {
  Layout layout{0, 0};
  std::vector<const GgufTensor*> kept;
  int64_t working_set = 0;  // experts that one token uses, all layers
  std::vector<OpCost> work;
  // Where not all of `kept` fits: the large matrices that every token uses, in the order of use,
  // and that of the embeddings, of which it uses a row.
  std::vector<StreamTensor> pass_order;
  StreamTensor lookup;
  // The tensors of `kept` that are pinned as a whole under a plan (all, where it is not active).
  std::vector<const GgufTensor*> pinned_under(const GgufFile& file, const StreamPlan& plan) const;
};
// Throws Error(kUnsupported) for tensors that the family does not know.
Partition partition(const GgufFile& file, const ModelConfig& config);

// Experts, and what `stream` streams, on flash, behind `reader` (whose files are the shards).
// poll is called every 20 ms.
Weights load_weights(const GgufFile& file, const ModelConfig& config, Partition partition,
                     StreamPlan stream, std::shared_ptr<FlashReader> reader,
                     const FlashExperts::Options& options, const std::function<void()>& poll);

}  // namespace stoker
