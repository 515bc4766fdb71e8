// The experts that the last tokens took, and what they foretell: a token whose path through the
// layers resembles that of an earlier one (the same word, often) will take the experts that the
// earlier one took further up, and the next token those of its successor.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "offload/policy/policy.h"

namespace stoker {

class PathMemory {
 public:
  explicit PathMemory(const PolicyShape& shape);

  // A new evaluation begins: of one token, which continues the last one's path, or of many.
  void begin(bool one_token);
  // Token `token` (ascending within a layer) took `experts` of `layer`.
  void take(int64_t token, int64_t layer, std::span<const int32_t> experts);
  // Compares the layer's experts of `token`, the newest, with those of the tokens before it.
  void compare(int64_t token, int64_t layer);
  // Weighs every remembered token by its likeness to `token`, whose forward pass has reached
  // `layer`.
  void weigh(int64_t token);
  // share [n_expert]: of the weight of tokens that took each expert of `layer`: in the remainder of
  // this forward pass where `ahead`, else in the next token's. All 0 while nothing is remembered.
  void foretell(int64_t layer, bool ahead, std::span<float> share) const;

 private:
  static constexpr int kTokens = 256;                 // remembered
  using Tokens = std::array<uint64_t, kTokens / 64>;  // one bit a token

  static size_t slot(int64_t token) { return static_cast<size_t>(token) % kTokens; }
  std::span<int32_t> path(size_t slot, int64_t layer);
  std::span<const int32_t> path(size_t slot, int64_t layer) const;

  int64_t n_layer_, n_expert_, width_;
  std::vector<int32_t> path_;  // [kTokens][n_layer][width]: experts, -1 behind the last
  std::vector<Tokens> taken_;  // [n_layer][n_expert]: which tokens took it
  // Experts in common with each remembered token. A layer that this token has not reached yet still
  // counts the last token's, against the predecessor of the remembered one: alike tokens follow
  // alike ones.
  std::vector<uint16_t> common_;      // [n_layer][kTokens], as the layer was compared
  std::vector<int64_t> compared_;     // [n_layer]: evaluations_ at that time
  std::array<int32_t, kTokens> sum_;  // over the layers, aligned with the present token
  int64_t evaluations_ = 0;
  int64_t newest_ = -1;  // token
  struct Weighed {
    size_t token;      // its slot
    size_t successor;  // of the token after it
    float weight;      // of all 1 in sum
  };
  std::vector<float> likeness_;  // [n_layer * width + 1]: weight by experts short of the most alike
  std::vector<Weighed> weighed_;  // those that matter
};

}  // namespace stoker
