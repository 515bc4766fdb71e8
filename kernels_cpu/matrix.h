// The type of every weight matrix.
#pragma once

#include <cstdint>

#include "kernels_cpu/kernel.h"

namespace stoker {

// A weight matrix in its file's layout; data is null where it is not, or not all, in memory.
struct Matrix {
  const Format* format = nullptr;
  const uint8_t* data = nullptr;  // [rows][row_bytes]
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;  // bytes a row
  // The source: the tensor's number in its file, and the slice where the tensor holds several.
  int32_t tensor = -1;
  int32_t slice = 0;
  int64_t first_row = 0;  // the tensor's row that is this matrix's first
  bool two_term = false;  // its activations have two int8 terms where precision is balanced

  explicit operator bool() const { return format != nullptr; }
  int64_t nbytes() const { return rows * stride; }
};

}  // namespace stoker
