// A stage of the sampling chain: one file a stage, one line in stages.inc, which is their order.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <span>

#include "runtime/sampling/candidates.h"
#include "runtime/sampling/sampler_options.h"

namespace stoker {

constexpr double kLargestNumber = std::numeric_limits<double>::max();

class SamplerStage {
 public:
  virtual ~SamplerStage() = default;
  // Changes logits [n_vocab] of one position; -inf bans a token. Called where adjusts() says so.
  virtual void adjust(float* logits) { (void)logits; }
  virtual bool adjusts() const { return false; }
  // Leaves out candidates (never all of them). draw: uniform in [0, 1), the stage's own number of
  // this position. Called where the temperature is above 0.
  virtual void cut(Candidates& candidates, double draw) { (void)candidates, (void)draw; }
  virtual bool cuts() const { return false; }
  // Tokens before the first choice that it wants to have accepted, the last ones; -1: all.
  virtual int64_t history() const { return 0; }
  // A token of the sequence, prompt included.
  virtual void accept(int32_t token) { (void)token; }
  // The tokens that may be chosen from now on, a bit each, lowest first; empty: all.
  virtual void set_mask(std::span<const uint32_t> allowed) { (void)allowed; }
  virtual void reset() {}  // no history
};

// One for each line of stages.inc: the stage, or null where the options leave it out. Throws
// Error(kOption) where one of its options is out of range.
#define STOKER_SAMPLER_STAGE(name) \
  std::unique_ptr<SamplerStage> make_##name##_stage(int n_vocab, const SamplerOptions& options);
#include "runtime/sampling/stages.inc"
#undef STOKER_SAMPLER_STAGE

// What an option has made of a finite logit, in the range of float32: only bans are infinite.
inline float bounded_logit(double logit) {
  constexpr double kLargest = std::numeric_limits<float>::max();
  return static_cast<float>(logit < -kLargest ? -kLargest : logit > kLargest ? kLargest : logit);
}

}  // namespace stoker
