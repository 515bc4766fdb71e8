// What is evaluated: tokens of any number of sequences, and what is wanted of each.
#pragma once

#include <cstdint>

#include "offload/units/step.h"

namespace stoker {

class Sequence;

// What comes of a row; any of these together.
enum Want : uint8_t {
  kWantNothing = 0,
  kWantHidden = 1,  // the final-norm hidden state
  kWantLogits = 2,
  kWantNll = 4,   // -ln p(target), nats
  kWantKept = 8,  // hidden state and logits, by its sequence, whose last row it is
};

// Rows of one sequence are in the order of their positions, the first being the sequence's own.
struct Row {
  Sequence* sequence = nullptr;
  int32_t token = 0;
  int64_t position = 0;
  uint8_t want = kWantNothing;  // of Want
  int32_t target = 0;           // of kWantNll
};

// Where it goes, of the rows that want it, one after the other in their order. Null: none does.
struct Outputs {
  float* hidden = nullptr;  // [..][n_embd]
  float* logits = nullptr;  // [..][n_vocab]
  double* nll = nullptr;    // [..]
};

}  // namespace stoker
