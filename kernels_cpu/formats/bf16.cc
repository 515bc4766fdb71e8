// BF16: the upper half of an IEEE binary32, one weight a block.
#include "kernels_cpu/formats/format_table.h"
#include "kernels_cpu/fp16.h"
#include "kernels_cpu/isa/tile_float.h"

namespace stoker {
namespace {

void dequantize(const uint8_t* src, float* dst, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = bf16_to_f32(load_u16(src + 2 * i));
}

void quantize(const float* src, uint8_t* dst, int64_t n, const float*) {
  for (int64_t i = 0; i < n; ++i) store_u16(dst + 2 * i, f32_to_bf16(src[i]));
}

}  // namespace

const Format kFormat_BF16 = {
    "BF16",
    FormatId::BF16,
    1,
    2,
    ActKind::f32,
    dequantize,
    quantize,
    {
        float_scalar::matmul_float<FloatKind::bf16>,
        STOKER_ON_X86(float_avx2::matmul_float<FloatKind::bf16>),    // avx2
        STOKER_ON_X86(float_avx2::matmul_float<FloatKind::bf16>),    // avxvnni
        STOKER_ON_X86(float_avx512::matmul_float<FloatKind::bf16>),  // avx512
        STOKER_ON_ARM64(float_neon::matmul_float<FloatKind::bf16>),  // neon
        STOKER_ON_ARM64(float_neon::matmul_float<FloatKind::bf16>),  // i8mm
    }};

}  // namespace stoker
