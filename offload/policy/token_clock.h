// The number of tokens that have passed, as a policy sees them: an evaluation of n tokens visits a
// layer with n uses, one a token.
#pragma once

#include <cstdint>

namespace stoker {

class TokenClock {
 public:
  // True where an evaluation begins: the forward pass passes the layers upwards.
  bool begin_layer(int64_t layer, int64_t tokens) {
    const bool begins = layer <= layer_;
    layer_ = layer;
    if (begins) {
      base_ += tokens_;
      tokens_ = tokens;
    }
    // Where a layer sees fewer tokens than the first one did, they are the last of them.
    index_ = tokens < tokens_ ? tokens_ - tokens - 1 : -1;
    return begins;
  }
  // The token of the next use() of this layer, counted from 0 over the life of the policy.
  int64_t next_use() {
    if (index_ + 1 < tokens_) ++index_;
    return now();
  }
  // The token of the last use() of this layer; before it the first of the evaluation.
  int64_t now() const { return base_ + (index_ < 0 ? 0 : index_); }

 private:
  int64_t base_ = 0;    // tokens of earlier evaluations
  int64_t tokens_ = 0;  // of this evaluation
  int64_t layer_ = INT64_MAX;
  int64_t index_ = -1;  // in this evaluation, of the last use of this layer
};

}  // namespace stoker
