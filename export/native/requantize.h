// Converts rows of weights between formats and finds every value of a bad file that cannot be held.
#pragma once

#include <cstdint>

#include "kernels_cpu/kernel.h"

namespace stoker {

struct RequantizeArgs {
  const Format* source = nullptr;
  const Format* target = nullptr;  // has quantize
  const uint8_t* data = nullptr;   // [rows][row bytes of source]
  int64_t rows = 0;
  int64_t cols = 0;                   // a multiple of both blocks
  const float* importance = nullptr;  // [cols] weights of the squared error, or null
  uint8_t* out = nullptr;             // [rows][row bytes of target]
  int64_t first_row = 0;              // the index of the first row in the tensor; for messages
  int threads = 1;
};

// The bytes do not depend on the threads; the same format on both sides is a copy.
// Throws Error(kModelFile) that names the first weight that is not finite or that the target (its
// scales, if it has blocks) cannot hold; std::bad_alloc.
void requantize(const RequantizeArgs& args);

}  // namespace stoker
