// Q3_K: 256 weights of 3 bits in 16 groups of 16 with 6-bit scales. w = d * (sc - 32) * (v - 4).
#include "kernels_cpu/formats/format_table.h"
#include "kernels_cpu/formats/search.h"
#include "kernels_cpu/fp16.h"
#include "kernels_cpu/isa/tile_scalar.h"

#define STOKER_UNPACKER "kernels_cpu/formats/unpack/q3_k.h"
#include "kernels_cpu/isa/tile_arm64.h"
#include "kernels_cpu/isa/tile_x86.h"

namespace stoker {
namespace {

struct BlockQ3_K {
  uint8_t hmask[32];   // bit 2 of v: weight 32 * i + l is bit i of byte l
  uint8_t qs[64];      // bits 0, 1: those of weight 128 * h + 32 * c + l are bits 2c, 2c + 1 of
                       // byte 32 * h + l
  uint8_t scales[12];  // sc: nibble g / 8 of byte g % 8; bits 4, 5: pair g / 4 of byte 8 + g % 4
  uint8_t d[2];        // f16 scale of the scales
};
static_assert(sizeof(BlockQ3_K) == 110);

int scale6(const uint8_t* p, int g) {
  return (p[g % 8] >> 4 * (g / 8) & 15) | (p[8 + g % 4] >> 2 * (g / 4) & 3) << 4;
}

struct Q3_K {
  using Block = BlockQ3_K;
  static constexpr int kBlock = 256;
  static constexpr int kGroup = 16;
  static constexpr bool kOffset = false;

  static void unpack(const Block& b, int g, int8_t* q, float* s, float* m) {
    const uint8_t* qs = b.qs + 32 * (g / 8) + 16 * (g % 2);
    const uint8_t* hmask = b.hmask + 16 * (g % 2);
    const int shift = 2 * (g % 8 / 2);
    for (int j = 0; j < 16; ++j) {
      q[j] = static_cast<int8_t>(((qs[j] >> shift & 3) | (hmask[j] >> (g / 2) & 1) << 2) - 4);
    }
    *s = load_f16(b.d) * static_cast<float>(scale6(b.scales, g) - 32);
    *m = 0;
  }
};

void quantize(const float* src, uint8_t* dst, int64_t n, const float* importance) {
  auto* block = reinterpret_cast<BlockQ3_K*>(dst);
  for (int64_t i = 0; i < n; i += 256, ++block) {
    const float* weight = importance == nullptr ? nullptr : importance + i;
    ScaledGroups<16> groups;
    quantize_scaled_groups<16>(src + i, weight, LinearCodes::of_bits(3), -32, 31, &groups);
    *block = {};
    store_f16(block->d, groups.d);
    for (int g = 0; g < 16; ++g) {
      const int sc = groups.scale[g] + 32;
      block->scales[g % 8] |= static_cast<uint8_t>((sc & 15) << 4 * (g / 8));
      block->scales[8 + g % 4] |= static_cast<uint8_t>(sc >> 4 << 2 * (g / 4));
    }
    for (int k = 0; k < 256; ++k) {
      const int v = static_cast<int>(groups.code[k]) + 4;
      block->qs[32 * (k / 128) + k % 32] |= static_cast<uint8_t>((v & 3) << k % 128 / 32 * 2);
      block->hmask[k % 32] |= static_cast<uint8_t>(v >> 2 << k / 32);
    }
  }
}

}  // namespace

const Format kFormat_Q3_K = {"Q3_K",
                             FormatId::Q3_K,
                             256,
                             110,
                             ActKind::i8,
                             dequantize_scalar<Q3_K>,
                             quantize,
                             {
                                 matmul_scalar<Q3_K>,
                                 STOKER_X86_MATMUL,
                                 STOKER_ARM64_MATMUL,
                             }};

}  // namespace stoker
