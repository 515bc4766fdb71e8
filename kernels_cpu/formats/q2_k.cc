// Q2_K: 256 weights of 2 bits in 16 groups of 16, whose 4-bit scales and minima are themselves
// scaled. w = d * sc * v - dmin * mn.
#include "kernels_cpu/formats/format_table.h"
#include "kernels_cpu/formats/search.h"
#include "kernels_cpu/fp16.h"
#include "kernels_cpu/isa/tile_scalar.h"

#define STOKER_UNPACKER "kernels_cpu/formats/unpack/q2_k.h"
#include "kernels_cpu/isa/tile_arm64.h"
#include "kernels_cpu/isa/tile_x86.h"

namespace stoker {
namespace {

struct BlockQ2_K {
  uint8_t scales[16];  // group g: sc in the low nibble, mn in the high one
  uint8_t qs[64];      // v, 0..3: weight 128 * h + 32 * c + l is bits 2c, 2c + 1 of byte 32 * h + l
  uint8_t d[2];        // f16 scale of the scales
  uint8_t dmin[2];     // f16 scale of the minima
};
static_assert(sizeof(BlockQ2_K) == 84);

struct Q2_K {
  using Block = BlockQ2_K;
  static constexpr int kBlock = 256;
  static constexpr int kGroup = 16;
  static constexpr bool kOffset = true;

  static void unpack(const Block& b, int g, int8_t* q, float* s, float* m) {
    const uint8_t* qs = b.qs + 32 * (g / 8) + 16 * (g % 2);
    const int shift = 2 * (g % 8 / 2);
    for (int j = 0; j < 16; ++j) q[j] = static_cast<int8_t>(qs[j] >> shift & 3);
    *s = load_f16(b.d) * static_cast<float>(b.scales[g] & 15);
    *m = -(load_f16(b.dmin) * static_cast<float>(b.scales[g] >> 4));
  }
};

void quantize(const float* src, uint8_t* dst, int64_t n, const float* importance) {
  auto* block = reinterpret_cast<BlockQ2_K*>(dst);
  for (int64_t i = 0; i < n; i += 256, ++block) {
    const float* weight = importance == nullptr ? nullptr : importance + i;
    AffineGroups<16> groups;
    quantize_affine_groups<16>(src + i, weight, 3, 15, &groups);
    *block = {};
    store_f16(block->d, groups.d);
    store_f16(block->dmin, groups.dmin);
    for (int g = 0; g < 16; ++g) {
      block->scales[g] = static_cast<uint8_t>(groups.scale[g] | groups.min[g] << 4);
    }
    for (int k = 0; k < 256; ++k) {
      block->qs[32 * (k / 128) + k % 32] |=
          static_cast<uint8_t>(groups.code[k] << k % 128 / 32 * 2);
    }
  }
}

}  // namespace

const Format kFormat_Q2_K = {"Q2_K",
                             FormatId::Q2_K,
                             256,
                             84,
                             ActKind::i8,
                             dequantize_scalar<Q2_K>,
                             quantize,
                             {
                                 matmul_scalar<Q2_K>,
                                 STOKER_X86_MATMUL,
                                 STOKER_ARM64_MATMUL,
                             }};

}  // namespace stoker
