// Makes experts from a dense matrix: copies with permuted neurons and a little noise,
// quantized. The seeds decide every bit, whatever the threads.
#pragma once

#include <cstdint>

#include "kernels_cpu/kernel.h"

namespace stoker {

// The axis of a matrix that counts the neurons: rows of gate and up, columns of down.
enum class NeuronAxis { kRows, kColumns };

struct ExpertsArgs {
  const Format* format = nullptr;  // has quantize; cols is a multiple of its block
  const float* x = nullptr;        // [rows][cols] the dense matrix
  int64_t rows = 0;
  int64_t cols = 0;
  NeuronAxis axis = NeuronAxis::kRows;
  int64_t experts = 0;
  const int32_t* order = nullptr;  // [experts][rows or cols]: neuron i is the matrix's order[i]
  const uint64_t* seed = nullptr;  // [experts]
  float noise = 0;                 // relative standard deviation; w * (1 + noise * uniform)
  uint8_t* out = nullptr;          // [experts][rows][row bytes]
  int threads = 1;
};

// Throws std::bad_alloc or std::system_error only (memory, threads).
void make_experts(const ExpertsArgs& args);

}  // namespace stoker
