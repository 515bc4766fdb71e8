// The machine's own limits, measured: what decoding (memory) and prompts (integer arithmetic) are
// compared with. Each takes well under a second.
#pragma once

#include <cstdint>

#include "kernels_cpu/kernel.h"

namespace stoker {

// Bytes a second that `threads` threads read together from one buffer of `bytes` bytes; the best
// of several passes. The threads share the buffer piece by piece, so that slow cores read less of
// it. Throws Error(kOption) where threads or bytes are below 1.
double read_bandwidth(int threads, int64_t bytes);

// int8 operations a second (a multiply-add is two) of the ISA's best instruction on `threads`
// threads, operands in registers; the best of several passes. Throws Error(kOption) where the ISA
// is not usable or threads is below 1.
double int8_peak(Isa isa, int threads);

// The same of float32 multiply-adds: fused, but for the scalar ISA on x86-64, whose baseline has
// none.
double float32_peak(Isa isa, int threads);

}  // namespace stoker
