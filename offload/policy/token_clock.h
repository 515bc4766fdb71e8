// TokenClock counts the tokens that have been evaluated, as a policy sees them: an evaluation of n
// tokens visits a layer with n uses, one a token.
#pragma once

#include <cstdint>

namespace stoker {

class TokenClock {
 public:
  // Returns true where an evaluation begins: a forward pass visits the layers in ascending order.
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
  // Returns the token of the next use() of this layer, counted from 0 over the life of the policy.
  int64_t next_use() {
    if (index_ + 1 < tokens_) ++index_;
    return now();
  }
  // Returns the token of the last use() of this layer; before any, the first of the evaluation.
  int64_t now() const { return base_ + (index_ < 0 ? 0 : index_); }

 private:
  int64_t base_ = 0;    // number of tokens of earlier evaluations
  int64_t tokens_ = 0;  // number of tokens of this evaluation
  int64_t layer_ = INT64_MAX;
  int64_t index_ = -1;  // index in this evaluation of the last use of this layer
};

}  // namespace stoker
