// MXFP4: 32 weights of 4-bit floats (E2M1: sign, 2 exponent bits, 1 mantissa bit) under one power of
// two (OCP Microscaling Formats v1.0). w = 2^(e - 127) * fp4(v); kDoubled holds 2 * fp4, so that the
// codes are integers, and the scale is halved.
#include "kernels_cpu/format_table.h"
#include "kernels_cpu/formats/packing.h"
#include "kernels_cpu/fp16.h"
#include "kernels_cpu/tile_scalar.h"

namespace stoker {
namespace {

struct BlockMXFP4 {
  uint8_t e;       // biased exponent of the scale
  uint8_t qs[16];  // v, 0..15: weight j in the low nibble of byte j, weight 16 + j in the high one
};
static_assert(sizeof(BlockMXFP4) == 17);

constexpr int8_t kDoubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// 2^(e - 128): a normal float from e = 2 on, 2^-128 and 2^-127 are subnormal. (e = 255, NaN in the
// standard, is read as 2^127, as the other readers of GGUF do.)
float half_scale(uint8_t e) {
  return f32_from_bits(e < 2 ? 0x00200000u << e : (e - 1u) << 23);
}

struct MXFP4 {
  using Block = BlockMXFP4;
  static constexpr int kBlock = 32;
  static constexpr int kGroup = 32;
  static constexpr bool kOffset = false;

  static void unpack(const Block& b, int, int8_t* q, float* s, float* m) {
    unpack_nibbles32(b.qs, q, kDoubled);
    *s = half_scale(b.e);
    *m = 0;
  }
};

}  // namespace

const Format kFormat_MXFP4 = {
    "MXFP4",
    FormatId::MXFP4,
    32,
    17,
    ActKind::i8,
    dequantize_scalar<MXFP4>,
    nullptr,
    {
        matmul_scalar<MXFP4>,
        STOKER_ON_X86(nullptr),    // avx2
        STOKER_ON_X86(nullptr),    // avxvnni
        STOKER_ON_X86(nullptr),    // avx512
        STOKER_ON_ARM64(nullptr),  // neon
        STOKER_ON_ARM64(nullptr),  // i8mm
    }};

}  // namespace stoker
