// F32: IEEE binary32, one weight a block.
#include <cstring>

#include "kernels_cpu/formats/format_table.h"
#include "kernels_cpu/isa/tile_float.h"

namespace stoker {
namespace {

void dequantize(const uint8_t* src, float* dst, int64_t n) {
  std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(float));
}

void quantize(const float* src, uint8_t* dst, int64_t n, const float*) {
  std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(float));
}

}  // namespace

const Format kFormat_F32 = {
    "F32",
    FormatId::F32,
    1,
    4,
    ActKind::f32,
    dequantize,
    quantize,
    {
        float_scalar::matmul_float<FloatKind::f32>,
        STOKER_ON_X86(float_avx2::matmul_float<FloatKind::f32>),    // avx2
        STOKER_ON_X86(float_avx2::matmul_float<FloatKind::f32>),    // avxvnni
        STOKER_ON_X86(float_avx512::matmul_float<FloatKind::f32>),  // avx512
        STOKER_ON_ARM64(float_neon::matmul_float<FloatKind::f32>),  // neon
        STOKER_ON_ARM64(float_neon::matmul_float<FloatKind::f32>),  // i8mm
    }};

}  // namespace stoker
