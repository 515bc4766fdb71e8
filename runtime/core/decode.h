// A step of generation of several sequences.
#pragma once

#include <cstdint>
#include <functional>
#include <span>

#include "runtime/core/engine.h"
#include "runtime/core/sequence.h"
#include "runtime/sampling/sampler.h"

namespace stoker {

struct DecodeStep {
  Sequence* sequence;
  int32_t token;  // chosen before, to be evaluated
  Sampler* sampler;
  int32_t next = -1;  // the token chosen after it; -1: Sequence::sample() says why there is none
};

// Evaluates one token of each sequence in one forward pass, and chooses the next of each. Throws
// what Engine::eval() throws; then no sequence has changed.
void decode(const Engine& engine, std::span<DecodeStep> steps, const std::function<void()>& poll);

}  // namespace stoker
