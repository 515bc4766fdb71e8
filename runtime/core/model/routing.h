// How a mixture chooses the experts of a token.
#pragma once

#include <cstdint>

namespace stoker {

enum class Gating {
  kSoftmax,
  kSigmoid,
  kUnit,  // the used experts count in full
};
constexpr const char* kGatingNames[] = {"softmax", "sigmoid", "unit"};

struct Routing {
  // The input that the router of a layer reads.
  enum class Where {
    kFeedForward,  // what the layer's feed-forward reads
    kLayerInput,   // the layer's raw input, before attention
    kOnce,         // one router after the first layer, which is dense, for all others
  };
  Where where = Where::kFeedForward;
  Gating gating = Gating::kSoftmax;
  bool normalize = false;  // the used experts' weights are divided by their sum
  float scale = 1;         // and multiplied by this
  // Experts compete in groups: a group's score is the sum of its two best, and only the experts of
  // the best groups can be chosen. 1: there are no groups.
  int64_t groups = 1, groups_used = 1;
  // A layer's experts are chosen at the mixture layer before it, out of what its router reads; the
  // layer's own router weighs them. The first one's router does both.
  bool pregated = false;
  int64_t n_hidden = 0;  // with kOnce: hidden width of the router
};

// Chooses the experts of one token. logits [n]: the router's; bias [n] or null: added to the gates
// for the choice alone; among [used] or null: the choice, if it is made elsewhere: these experts'
// weights have the sum that the router's own choice would have had. scratch [3 * n] floats. Writes
// expert [used], best first (the lower expert of equals), and weight [used].
void choose_experts(const Routing& routing, int64_t n, int64_t used, const float* logits,
                    const float* bias, const int32_t* among, float* scratch, int32_t* expert,
                    float* weight);

// Computes what experts are ranked by: score [n], monotone in the choice. It may be the logits.
void selection_scores(const Routing& routing, int64_t n, const float* bias, float* logits);

}  // namespace stoker
