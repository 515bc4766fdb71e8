// Replays recorded routing through a cache without a model and counts which experts miss, under
// each policy and under Belady's, which knows the future.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "offload/policy/policy.h"

namespace stoker {

// Routing in the order of the forward pass. A visit is one token at one layer; consecutive visits
// of one evaluation and layer are a chunk of a prompt, which asks for each of its experts once.
struct RoutingTrace {
  PolicyShape shape;
  std::span<const int64_t> evaluation;  // [visits] ascending
  std::span<const int32_t> layer;       // [visits] ascending within an evaluation
  std::span<const int64_t> offset;      // [visits + 1] first use of each visit
  std::span<const int32_t> expert;      // [uses] distinct within a visit
  std::span<const float> weight;        // [uses] of the router
  std::span<const int32_t> token;       // [visits] of the vocabulary; empty: not known
  std::span<const uint8_t> decode;      // [visits] whether its evaluation generates
  std::span<const int64_t> sequence;    // [visits] of its token; empty: all are of one
};

struct Replay {
  int64_t uses = 0;    // distinct experts used by a chunk or token, from count_from on
  int64_t misses = 0;  // how many of these uses miss
  // The misses of decoded tokens; how many of them the predictor had named before the layer was
  // reached; and how many units it named that were neither used nor in the cache.
  int64_t decode_misses = 0, foreseen = 0, needless = 0;
  std::vector<int64_t> layer_uses;    // [n_layer]
  std::vector<int64_t> layer_misses;  // [n_layer]
};

// Replays a trace through a cold cache of `slots` units of any layer, which reads on demand. The
// policy is told of a token's experts before the missing ones, in the order in which the tokens
// first use them, evict units that this chunk does not need (any unit, once there is no other).
// Counts from evaluation `count_from` on. policy: a name of policies.inc or "belady". predictor:
// empty, or one that needs routing and tokens only (kReplayed); it names as many experts a layer as
// a token uses, and what it names is counted, not read. Throws Error(kOption) for an unknown policy
// or predictor, slots < 1 or a trace that breaks the rules above.
Replay replay(const RoutingTrace& trace, std::string_view policy, int64_t slots, int64_t count_from,
              std::string_view predictor = {});

inline constexpr std::string_view kReplayed[] = {"history", "transition"};

}  // namespace stoker
