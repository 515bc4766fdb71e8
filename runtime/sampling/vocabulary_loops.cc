#include "runtime/sampling/vocabulary_loops.h"

#include <bit>

#include "kernels_cpu/kernel.h"
#include "kernels_cpu/target.h"

namespace stoker {

namespace {

constexpr double kLeastPower = -709.1;  // e^kLeastPower is taken as 0: 2^-1023 in exp_clamped
constexpr int kLanes = 16;  // independent chains of a reduction, so that compilers vectorise it

namespace baseline {
#include "runtime/sampling/vocabulary_loops.inc"
}  // namespace baseline
#if STOKER_X86
STOKER_BEGIN_AVX2
namespace avx2 {
#include "runtime/sampling/vocabulary_loops.inc"
}  // namespace avx2
STOKER_END_TARGET
#endif

}  // namespace

const VocabularyLoops& vocabulary_loops() {
#if STOKER_X86
  static const bool wide = active_isa() != Isa::scalar;
  if (wide) return avx2::kLoops;
#endif
  return baseline::kLoops;
}

double exp_negative(double x) { return baseline::exp_negative(x); }

int32_t logit_key(int32_t bits) { return baseline::order_key(bits); }

}  // namespace stoker
