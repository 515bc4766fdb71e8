// ExpertStore is the only access to expert weights. A layer asks for experts by number and gets
// leases of them in the order in which they are ready: at once where everything is resident, as
// reads complete where experts are on flash.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "kernels_cpu/matrix.h"
#include "offload/units/step.h"

namespace stoker {

struct Expert {
  Matrix gate;  // [n_ff][n_embd]
  Matrix up;    // [n_ff][n_embd]
  Matrix down;  // [n_embd][n_ff]
};

// A lease of experts of one layer. Those that next_ready() gave are pinned until it is called again
// or the lease is destroyed, so that a layer may need more experts than there are slots.
class ExpertLease {
 public:
  virtual ~ExpertLease() = default;
  // Waits until at least one more expert is ready and returns the indices (into the experts asked
  // for) of those that became ready since the last call. Empty when all have been given. Throws
  // Error(kDevice) where a read failed.
  virtual std::span<const int32_t> next_ready() = 0;
  // Returns an expert; valid for the indices that the last next_ready() gave.
  virtual const Expert& expert(int32_t index) const = 0;
};

// The experts that the router of a layer chose for a chunk of tokens.
struct Routes {
  std::vector<int32_t> expert;  // [tokens][n_expert_used], best first
  std::vector<float> weight;    // [tokens][n_expert_used]
};

// Applies the routers of later layers to what is known now, for predictors.
class RouterProbe {
 public:
  // Computes the logits [tokens][n_expert] of `layer`'s router for the present hidden states of the
  // chunk.
  virtual void logits(int64_t layer, float* out) = 0;
  // Returns the present hidden states [tokens][n_embd] (the residual stream).
  virtual const float* hidden() const = 0;

 protected:
  ~RouterProbe() = default;
};

// Its methods are called between the layers of a forward pass, in this order: begin() a chunk; for
// each mixture layer prefetch_certain() where its experts are known before its attention,
// acquire(), look_ahead(); end().
class ExpertStore {
 public:
  virtual ~ExpertStore() = default;
  // A chunk of rows begins its forward pass. poll is called every 20 ms of waiting and may throw to
  // interrupt it; both must live until the forward pass ends.
  virtual void begin(const Step& step, const std::function<void()>* poll) {
    (void)step, (void)poll;
  }
  virtual void end() {}  // after the chunk's last layer
  // Tells which experts `layer` will certainly use; for any number of layers ahead, once each.
  virtual void prefetch_certain(int64_t layer, const Routes& routes) { (void)layer, (void)routes; }
  // Leases experts: the distinct numbers of routes.expert, ascending. Only one lease may exist at a
  // time.
  virtual std::unique_ptr<ExpertLease> acquire(int64_t layer, std::span<const int32_t> experts,
                                               const Routes& routes) = 0;
  // Guesses what comes after `layer`, whose reads are in flight; -1: before layer 0, when the
  // hidden states are the tokens' embeddings.
  virtual void look_ahead(int64_t layer, RouterProbe& ahead) { (void)layer, (void)ahead; }
};

// An expert store with every expert in memory.
class ResidentExperts : public ExpertStore {
 public:
  explicit ResidentExperts(int64_t n_layer) : layers_(static_cast<size_t>(n_layer)) {}
  void add(int64_t layer, Expert expert) { layers_[static_cast<size_t>(layer)].push_back(expert); }
  std::unique_ptr<ExpertLease> acquire(int64_t layer, std::span<const int32_t> experts,
                                       const Routes& routes) override;

 private:
  std::vector<std::vector<Expert>> layers_;  // [n_layer][n_expert]
};

}  // namespace stoker
