// Passes over the whole vocabulary, for the vector width of this machine; the same bits at each.
#pragma once

#include <cstdint>

namespace stoker {

constexpr int kSumBlock = 1024;  // logits that are summed as one

struct KeyRange {
  int32_t least;
  int32_t largest;
};

struct VocabularyLoops {
  // weights[i] = e^((logits[i] - max) * inverse_temperature), i < n <= kSumBlock; their sum.
  double (*weigh)(const float* logits, int n, double max, double inverse_temperature,
                  double* weights);
  // The least and the largest order_key of n logits.
  KeyRange (*key_range)(const float* logits, int n);
  // The first i >= begin with logits[i] > threshold, n where there is none.
  int (*find_above)(const float* logits, int begin, int n, float threshold);
};

const VocabularyLoops& vocabulary_loops();

// e^x for x <= 0, within 2 ulp, from IEEE operations alone: the same on every platform.
double exp_negative(double x);
// A float's bits as an integer of the same order, its own inverse; NaNs fall outside the keys of
// -inf and +inf.
int32_t logit_key(int32_t bits);

}  // namespace stoker
