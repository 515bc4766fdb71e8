// float_<isa>::matmul_float<FloatKind>: the matmuls of F32, F16 and BF16, written once
// (tile_float.inc) and compiled for each instruction set.
#pragma once

#include <cstdint>

#include "kernels_cpu/kernel.h"
#include "kernels_cpu/target.h"
#include "kernels_cpu/isa/vec_avx2.h"
#include "kernels_cpu/isa/vec_avx512.h"
#include "kernels_cpu/isa/vec_neon.h"
#include "kernels_cpu/isa/vec_scalar.h"

namespace stoker {

enum class FloatKind { f32, f16, bf16 };

#define STOKER_VEC UnalignedScalarVec
#define STOKER_ROWS 1
#define STOKER_TOKENS 1
#define STOKER_HALF_ROWS 1
#define STOKER_HALF_TOKENS 1
#define STOKER_DECODE_ROWS 1
namespace float_scalar {
// Plain C++ may not read 16-bit or 32-bit values at odd addresses, so the bytes are copied first.
struct UnalignedScalarVec : ScalarVec {
  UnalignedScalarVec() = default;
  UnalignedScalarVec(const ScalarVec& other) : ScalarVec(other) {}
  static ScalarVec load(const float* p) {
    ScalarVec r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
  }
  static ScalarVec load_f16(const uint16_t* p) {
    uint16_t h[16];
    std::memcpy(h, p, sizeof h);
    return ScalarVec::load_f16(h);
  }
  static ScalarVec load_bf16(const uint16_t* p) {
    uint16_t h[16];
    std::memcpy(h, p, sizeof h);
    return ScalarVec::load_bf16(h);
  }
};
#include "kernels_cpu/isa/tile_float.inc"
}  // namespace float_scalar
#undef STOKER_VEC
#undef STOKER_ROWS
#undef STOKER_TOKENS
#undef STOKER_HALF_ROWS
#undef STOKER_HALF_TOKENS
#undef STOKER_DECODE_ROWS

#if STOKER_X86
STOKER_BEGIN_AVX2
#define STOKER_VEC Avx2Vec
#define STOKER_ROWS 3
#define STOKER_TOKENS 2
#define STOKER_HALF_ROWS 1
#define STOKER_HALF_TOKENS 4
#define STOKER_DECODE_ROWS 3
namespace float_avx2 {
#include "kernels_cpu/isa/tile_float.inc"
}  // namespace float_avx2
#undef STOKER_VEC
#undef STOKER_ROWS
#undef STOKER_TOKENS
#undef STOKER_HALF_ROWS
#undef STOKER_HALF_TOKENS
#undef STOKER_DECODE_ROWS
STOKER_END_TARGET

STOKER_BEGIN_AVX512
#define STOKER_VEC Avx512Vec
#define STOKER_ROWS 4
#define STOKER_TOKENS 4
#define STOKER_HALF_ROWS 4
#define STOKER_HALF_TOKENS 4
#define STOKER_DECODE_ROWS 4
namespace float_avx512 {
#include "kernels_cpu/isa/tile_float.inc"
}  // namespace float_avx512
#undef STOKER_VEC
#undef STOKER_ROWS
#undef STOKER_TOKENS
#undef STOKER_HALF_ROWS
#undef STOKER_HALF_TOKENS
#undef STOKER_DECODE_ROWS
STOKER_END_TARGET
#endif

#if STOKER_ARM64
STOKER_BEGIN_NEON
#define STOKER_VEC NeonVec
#define STOKER_ROWS 2
#define STOKER_TOKENS 2
#define STOKER_HALF_ROWS 2
#define STOKER_HALF_TOKENS 2
#define STOKER_DECODE_ROWS 4
namespace float_neon {
#include "kernels_cpu/isa/tile_float.inc"
}  // namespace float_neon
#undef STOKER_VEC
#undef STOKER_ROWS
#undef STOKER_TOKENS
#undef STOKER_HALF_ROWS
#undef STOKER_HALF_TOKENS
#undef STOKER_DECODE_ROWS
STOKER_END_TARGET
#endif

}  // namespace stoker
