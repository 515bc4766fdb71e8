// The only door to expert weights. A layer asks for experts by number and gets leases of them in
// the order in which they are ready: at once where everything is resident, as reads complete where
// experts live on flash.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kernels_cpu/kernel.h"

namespace stoker {

// A weight matrix in its file's layout.
struct Matrix {
  const Format* format = nullptr;
  const uint8_t* data = nullptr;  // [rows][row_bytes]
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;  // bytes a row

  explicit operator bool() const { return data != nullptr; }
  int64_t nbytes() const { return rows * stride; }
};

struct Expert {
  Matrix gate;  // [n_ff][n_embd]
  Matrix up;    // [n_ff][n_embd]
  Matrix down;  // [n_embd][n_ff]
};

// Experts of one layer, pinned from acquire() until the lease is destroyed.
class ExpertLease {
 public:
  virtual ~ExpertLease() = default;
  // Indices into the experts asked for that have become ready since the last call; waits until at
  // least one is. Empty when all have been given. Throws Error(kDevice) where a read failed.
  virtual std::span<const int32_t> next_ready() = 0;
  // Valid for indices that next_ready() has given.
  virtual const Expert& expert(int32_t index) const = 0;
};

class ExpertStore {
 public:
  virtual ~ExpertStore() = default;
  // experts: distinct numbers, ascending. One lease at a time for each caller.
  virtual std::unique_ptr<ExpertLease> acquire(int64_t layer, std::span<const int32_t> experts) = 0;
  // Bytes of one layer's expert weights, all experts.
  virtual int64_t layer_bytes(int64_t layer) const = 0;
};

// Every expert in memory.
class ResidentExperts : public ExpertStore {
 public:
  explicit ResidentExperts(int64_t n_layer) : layers_(static_cast<size_t>(n_layer)) {}
  void add(int64_t layer, Expert expert) { layers_[static_cast<size_t>(layer)].push_back(expert); }
  std::unique_ptr<ExpertLease> acquire(int64_t layer, std::span<const int32_t> experts) override;
  int64_t layer_bytes(int64_t layer) const override;

 private:
  std::vector<std::vector<Expert>> layers_;  // [n_layer][n_expert]
};

}  // namespace stoker
