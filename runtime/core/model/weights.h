// The weights: matrices as views into loaded shards, norms and biases as f32.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "offload/units/expert_store.h"
#include "offload/flash_experts.h"
#include "offload/weight_stream.h"
#include "runtime/core/model/config.h"
#include "runtime/core/model/layer_weights.h"
#include "runtime/core/model/tensor_row.h"
#include "runtime/gguf/gguf.h"
#include "runtime/base/memory.h"

namespace stoker {

// Weights in memory of our own: they cannot change or vanish under a running model as those of a
// mapped file can. Of each shard a whole file's data section, or (experts on flash) the tensors
// that stay.
class TensorMemory {
 public:
  // Reads the data section of every shard on `threads` threads. Throws Error(kModelFile).
  TensorMemory(const GgufFile& file, int threads);
  // Returns the bytes that the first form takes.
  static int64_t nbytes(const GgufFile& file);
  // Reads the given tensors only, page-aligned as direct I/O delivers them.
  TensorMemory(const std::vector<const GgufTensor*>& tensors, FlashReader& reader,
               const std::function<void()>& poll);
  // Returns the bytes that the second form takes.
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

struct Weights : ModelWeights {
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

// Loads all weights into memory.
Weights load_weights(const GgufFile& file, const ModelConfig& config, const TensorTable& table,
                     int threads);

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
  std::array<int64_t, kTensorKinds> bytes_by_kind{};  // of all tensors, by TensorKind
  // Returns the tensors of `kept` that a plan pins as a whole (all of them if it is not active).
  std::vector<const GgufTensor*> pinned_under(const GgufFile& file, const StreamPlan& plan) const;
};
// Partitions a file's tensors. Throws Error(kUnsupported) for tensors that the family does not
// know.
Partition partition(const GgufFile& file, const ModelConfig& config, const TensorTable& table);

// Experts, and what `stream` streams, on flash, behind `reader` (whose files are the shards).
// poll is called every 20 ms.
Weights load_weights(const GgufFile& file, const ModelConfig& config, const TensorTable& table,
                     Partition partition, StreamPlan stream, std::shared_ptr<FlashReader> reader,
                     const FlashExperts::Options& options, const std::function<void()>& poll);

}  // namespace stoker
