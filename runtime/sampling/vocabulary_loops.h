// Loops over the whole vocabulary for the vector width of this machine. Every width gives the same
// bits.
#pragma once

#include <cstdint>

namespace stoker {

constexpr int kSumBlock = 1024;  // logits in a block that is summed at once

struct KeyRange {
  int32_t least;
  int32_t largest;
};

struct VocabularyLoops {
  // Sets weights[i] = e^((logits[i] - max) * inverse_temperature), i < n <= kSumBlock; returns
  // their sum.
  double (*weigh)(const float* logits, int n, double max, double inverse_temperature,
                  double* weights);
  // Returns the least and the largest logit_key of n logits.
  KeyRange (*key_range)(const float* logits, int n);
  // Returns the first i >= begin with logits[i] > threshold, n where there is none.
  int (*find_above)(const float* logits, int begin, int n, float threshold);
};

const VocabularyLoops& vocabulary_loops();

// Returns e^x for x <= 0 within 2 ulp. It uses IEEE operations only, so that every platform gets
// the same bits.
double exp_negative(double x);
// Maps a float's bits to an integer of the same order; the map is its own inverse. NaNs fall
// outside the keys of -inf and +inf.
int32_t logit_key(int32_t bits);

}  // namespace stoker
