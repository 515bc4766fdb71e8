// The machine's own limits, measured: decode is compared with memory, prefill with integer
// arithmetic. Each measurement takes well under a second.
#pragma once

#include <cstdint>

#include "kernels_cpu/kernel.h"

namespace stoker {

// Bytes per second that `threads` threads read together from one buffer of `bytes` bytes; the best
// of several passes. The threads share the buffer piece by piece, so that slow cores read less of
// it. Throws Error(kOption) if threads or bytes are below 1.
double read_bandwidth(int threads, int64_t bytes);

// int8 operations per second (a multiply-add is two) of the ISA's best instruction on `threads`
// threads, operands in registers; the best of several passes. Throws Error(kOption) if the ISA
// is not usable or threads is below 1.
double int8_peak(Isa isa, int threads);

// The same for float32 multiply-adds, which are fused except on the scalar ISA of x86-64, whose
// baseline has none.
double float32_peak(Isa isa, int threads);

}  // namespace stoker
