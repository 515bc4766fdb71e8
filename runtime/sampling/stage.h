// A stage of the sampling chain. Each stage has a file of its own and a line in stages.inc, which
// defines their order.
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
  // Changes the logits [n_vocab] of one position; -inf bans a token. Called if adjusts() is true.
  virtual void adjust(float* logits) { (void)logits; }
  virtual bool adjusts() const { return false; }
  // Removes candidates (never all of them). `draw` is the stage's own random number for this
  // position, uniform in [0, 1). Called where cuts() is true and the temperature is above 0.
  virtual void cut(Candidates& candidates, double draw) { (void)candidates, (void)draw; }
  virtual bool cuts() const { return false; }
  // The number of last prompt tokens that the stage needs accepted before the first choice; -1
  // means all.
  virtual int64_t history() const { return 0; }
  // Adds a token of the sequence, prompt included, to the stage's history.
  virtual void accept(int32_t token) { (void)token; }
  // Sets which tokens may be chosen from now on, one bit each, lowest first; empty allows all.
  virtual void set_mask(std::span<const uint32_t> allowed) { (void)allowed; }
  virtual void reset() {}  // clears the history
};

// Each line of stages.inc has such a function. It returns the stage, or null where the options
// leave it out. Throws Error(kOption) where one of the stage's options is out of range.
#define STOKER_SAMPLER_STAGE(name) \
  std::unique_ptr<SamplerStage> make_##name##_stage(int n_vocab, const SamplerOptions& options);
#include "runtime/sampling/stages.inc"
#undef STOKER_SAMPLER_STAGE

// Clamps an adjusted logit to the finite range of float32: only bans may be infinite.
inline float bounded_logit(double logit) {
  constexpr double kLargest = std::numeric_limits<float>::max();
  return static_cast<float>(logit < -kLargest ? -kLargest : logit > kLargest ? kLargest : logit);
}

}  // namespace stoker
