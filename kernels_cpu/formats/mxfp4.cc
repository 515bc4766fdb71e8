// MXFP4: 32 weights of 4-bit floats (E2M1: sign, 2 exponent bits, 1 mantissa bit) under one power
// of two (OCP Microscaling Formats v1.0). w = 2^(e - 127) * fp4(v); kDoubled holds 2 * fp4, so that
// the codes are integers, and the scale is halved.
#include <algorithm>
#include <cmath>

#include "kernels_cpu/formats/format_table.h"
#include "kernels_cpu/formats/packing.h"
#include "kernels_cpu/fp16.h"
#include "kernels_cpu/isa/tile_scalar.h"

#define STOKER_UNPACKER "kernels_cpu/formats/unpack/mxfp4.h"
#include "kernels_cpu/isa/tile_arm64.h"
#include "kernels_cpu/isa/tile_x86.h"

namespace stoker {
namespace {

struct BlockMXFP4 {
  uint8_t e;       // biased exponent of the scale
  uint8_t qs[16];  // v, 0..15: weight j in the low nibble of byte j, weight 16 + j in the high one
};
static_assert(sizeof(BlockMXFP4) == 17);

constexpr int8_t kDoubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// Returns 2^(e - 128), a normal float from e = 2 on; 2^-128 and 2^-127 are subnormal. (e = 255, NaN
// in the standard, is read as 2^127, as the other readers of GGUF do.)
float half_scale(uint8_t e) { return f32_from_bits(e < 2 ? 0x00200000u << e : (e - 1u) << 23); }

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

float block_error(const float* x, const float* importance, uint8_t e, uint8_t* code) {
  const float d = half_scale(e);
  float total = 0;
  for (int j = 0; j < 32; ++j) {
    float smallest = INFINITY;
    code[j] = 0;
    for (int v = 0; v < 16; ++v) {  // of equal errors the first wins
      const float error = std::fabs(d * static_cast<float>(kDoubled[v]) - x[j]);
      if (error < smallest) {
        smallest = error;
        code[j] = static_cast<uint8_t>(v);
      }
    }
    const float relative = smallest / d;  // d > 0; keeps the square in range
    total += (importance == nullptr ? 1.0f : importance[j]) * relative * relative;
  }
  return total;
}

// The exponent of the largest weight less two puts it in the upper octave of fp4, 4..6 (beyond 6 it
// is cut off), as the standard says; with importances the next exponent is tried too.
void quantize(const float* src, uint8_t* dst, int64_t n, const float* importance) {
  auto* block = reinterpret_cast<BlockMXFP4*>(dst);
  for (int64_t i = 0; i < n; i += 32, ++block) {
    float largest = 0;
    for (int j = 0; j < 32; ++j) largest = std::max(largest, std::fabs(src[i + j]));
    int exponent;  // largest = [0.5, 1) * 2^exponent
    std::frexp(largest, &exponent);
    const int e = largest > 0 ? std::max(exponent - 3 + 127, 0) : 0;
    block->e = static_cast<uint8_t>(e);
    uint8_t code[32];
    const float* weight = importance == nullptr ? nullptr : importance + i;
    const float error = block_error(src + i, weight, block->e, code);
    if (weight != nullptr) {
      uint8_t other[32];
      const uint8_t next = static_cast<uint8_t>(std::min(e + 1, 254));
      // Errors are in units of the block's scale: at twice the scale, squares count four times.
      if (4 * block_error(src + i, weight, next, other) < error) {
        block->e = next;
        std::copy(other, other + 32, code);
      }
    }
    pack_nibbles32(code, block->qs);
  }
}

}  // namespace

const Format kFormat_MXFP4 = {"MXFP4",
                              FormatId::MXFP4,
                              32,
                              17,
                              ActKind::i8,
                              dequantize_scalar<MXFP4>,
                              quantize,
                              {
                                  matmul_scalar<MXFP4>,
                                  STOKER_X86_MATMUL,
                                  STOKER_ARM64_MATMUL,
                              }};

}  // namespace stoker
