// PathMemory keeps the experts that the last tokens took and predicts from them: a token whose path
// through the layers resembles that of an earlier one (often the same word) will take the experts
// that the earlier one took in later layers, and the next token those of the earlier one's
// successor.
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

  // Begins a new evaluation: of one token, which continues the last one's path, or of many.
  void begin(bool one_token);
  // Records that token `token` (ascending within a layer) took `experts` of `layer`.
  void take(int64_t token, int64_t layer, std::span<const int32_t> experts);
  // Compares the layer's experts of `token`, the newest, with those of the tokens before it.
  void compare(int64_t token, int64_t layer);
  // Weighs every remembered token by its likeness to `token`, whose forward pass has reached
  // `layer`.
  void weigh(int64_t token);
  // Fills share [n_expert] with the part of the weight that belongs to tokens that took each expert
  // of `layer`: in the rest of this forward pass where `ahead`, else in the next token's. All are 0
  // while nothing is remembered.
  void foretell(int64_t layer, bool ahead, std::span<float> share) const;

 private:
  static constexpr int kTokens = 256;                 // tokens remembered
  using Tokens = std::array<uint64_t, kTokens / 64>;  // one bit a token

  static size_t slot(int64_t token) { return static_cast<size_t>(token) % kTokens; }
  std::span<int32_t> path(size_t slot, int64_t layer);
  std::span<const int32_t> path(size_t slot, int64_t layer) const;

  int64_t n_layer_, n_expert_, width_;
  std::vector<int32_t> path_;  // [kTokens][n_layer][width]: experts, -1 behind the last
  std::vector<Tokens> taken_;  // [n_layer][n_expert]: which tokens took it
  // The number of experts in common with each remembered token. For a layer that this token has not
  // reached yet, the last token's number against the remembered token's predecessor still counts,
  // because similar tokens follow similar ones.
  std::vector<uint16_t> common_;      // [n_layer][kTokens], as of the layer's last comparison
  std::vector<int64_t> compared_;     // [n_layer]: evaluations_ at that time
  std::array<int32_t, kTokens> sum_;  // sum over the layers, aligned with the present token
  int64_t evaluations_ = 0;
  int64_t newest_ = -1;  // number of the newest token
  struct Weighed {
    size_t token;      // slot of the token
    size_t successor;  // slot of the token after it
    float weight;      // all sum to 1
  };
  std::vector<float> likeness_;  // [n_layer * width + 1]: weight by experts short of the most alike
  std::vector<Weighed> weighed_;  // those above kNegligible
};

}  // namespace stoker
