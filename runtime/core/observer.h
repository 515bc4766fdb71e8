// Who watches an evaluation: taps, sums of activations. Called on the evaluating thread.
#pragma once

#include <cstdint>
#include <span>

#include "kernels_cpu/matrix.h"

namespace stoker {

class Observer {
 public:
  virtual ~Observer() = default;
  // A chunk begins: row i of what follows is row rows[i] of the evaluation.
  virtual void begin(std::span<const int32_t> rows) { (void)rows; }
  // Called with the residual stream x [n][n_embd]: the embeddings (il -1), and at the look-ahead of
  // each mixture layer.
  virtual void hidden(int64_t il, const float* x) { (void)il, (void)x; }
  // Called with what a layer's feed-forward or router reads, [n][n_embd].
  virtual void block_input(int64_t il, const float* in) { (void)il, (void)in; }
  // Called for a product of matrix and rows list[0 .. n) of x, or first .. first + n without a
  // list.
  virtual void product(const Matrix& matrix, const Activations& x, const int32_t* list,
                       int64_t first, int64_t n) {
    (void)matrix, (void)x, (void)list, (void)first, (void)n;
  }
};

}  // namespace stoker
