// The speed of one matrix product, as the engine runs it: for `stoker bench-kernels`, the device
// profile, and the count of instructions.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels_cpu/kernel.h"
#include "runtime/base/memory.h"
#include "runtime/base/threads.h"

namespace stoker {

// A matrix of one format in huge pages, activations, and the kernel of one instruction set.
class KernelProduct {
 public:
  // Throws Error(kOption) if the ISA is not usable or a size is below 1. cols: a multiple of the
  // format's block and of 32.
  KernelProduct(const Format& format, Isa isa, int64_t rows, int64_t cols, int64_t tokens,
                int threads);
  // Computes the product once, in the pieces that the engine would hand to its threads.
  void run();
  // Quantizes the activations if the format wants int8.
  void quantize();
  int64_t weight_bytes() const { return rows_ * args_.row_bytes; }
  const float* y() const { return y_.get(); }  // [tokens][rows]

 private:
  template <class T>
  struct Aligned {
    explicit Aligned(int64_t n);
    T* get() const { return data; }
    std::vector<uint8_t> memory;
    T* data;  // 64-byte aligned
  };
  const MatmulFn kernel_;
  const QuantizeActFn quantize_;
  const int64_t rows_;
  int64_t piece_;  // rows of a piece
  int64_t scratch_bytes_;
  HugeMemory w_;            // [rows][row_bytes]
  Aligned<float> x_;        // [tokens][cols]
  Aligned<int8_t> q_;       // [tokens][q_stride]
  Aligned<float> scale_;    // [tokens][cols / 32]
  Aligned<int32_t> sum16_;  // [tokens][cols / 16]
  Aligned<float> y_;        // [tokens][rows]
  Aligned<uint8_t> scratch_;
  MatmulArgs args_;
  ThreadPool pool_;
};

// Seconds of the fastest of the products that fit in about `seconds` (at least one, after one to
// warm up, which is the only one if it takes longer than `seconds`). quantize: includes quantizing
// the activations, which the engine does once for several products.
double kernel_speed(const Format& format, Isa isa, int64_t rows, int64_t cols, int64_t tokens,
                    int threads, double seconds, bool quantize = false);

}  // namespace stoker
