// A family's tensors as a table. The loader, the partition into experts and others, what a token
// multiplies with, the order in which weights are streamed, the plan's kinds and the check for
// tensors that nobody knows derive from it.
#pragma once

#include <cstdint>
#include <span>

#include "runtime/core/model/config.h"
#include "runtime/core/model/layer_weights.h"

namespace stoker {

// The kind of a tensor in plans and tables for people.
enum class TensorKind {
  kExperts,
  kSharedExperts,
  kRouters,
  kNorms,
  kAttention,
  kFeedForward,
  kEmbeddings,
  kOutput,
  kOther,
};
constexpr int kTensorKinds = 9;
const char* tensor_kind_name(TensorKind kind);

// The role of a tensor in the memory plan.
enum class TensorRole {
  kPinned,    // always in memory: small, or looked at ahead of time
  kStreamed,  // every token uses all of it: read anew where it does not fit
  kExpert,    // one slice an expert: on flash under a budget
  kLookup,    // a token uses a row of it
};

// The layers that have the tensor.
enum class TensorLayers {
  kAll,
  kDense,
  kMixture,
  kMixtureBeforeAnother,  // all mixture layers but the last
};

using TensorSize = int64_t (*)(const ModelConfig&);

// A tensor of every layer, "blk.<layer>.<name>", or (Owner = ModelWeights) of the model, "<name>".
// A matrix has the shape [rows][cols], a vector [rows]. Where either gives 0 there is none.
template <class Owner>
struct TensorRow {
  const char* name;
  TensorKind kind;
  TensorSize rows;
  TensorSize cols = nullptr;        // of a matrix
  Matrix Owner::*matrix = nullptr;  // or
  Vector Owner::*vector = nullptr;  // or neither: an expert's part
  TensorRole role = TensorRole::kPinned;
  TensorLayers layers = TensorLayers::kAll;
  bool optional = false;
  bool two_term = false;  // its activations have two int8 terms at Precision::kBalanced
  // Some files hold several matrices as one, these rows from `joined_begin` on.
  const char* joined = nullptr;
  TensorSize joined_begin = nullptr, joined_rows = nullptr;
};

using LayerTensor = TensorRow<LayerWeights>;
using ModelTensor = TensorRow<ModelWeights>;

// Tables of several families, put together: one list a subject, in the order of use.
struct TensorTable {
  std::span<const std::span<const ModelTensor>> model;
  std::span<const std::span<const LayerTensor>> layers;
};

}  // namespace stoker
