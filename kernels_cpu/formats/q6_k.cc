// Q6_K: 256 weights of 6 bits in 16 groups of 16 with 8-bit scales. w = d * sc * (v - 32).
// Weight 128 * h + 32 * c + l (l < 32) is column c of half h.
#include "kernels_cpu/formats/format_table.h"
#include "kernels_cpu/formats/search.h"
#include "kernels_cpu/fp16.h"
#include "kernels_cpu/isa/tile_scalar.h"

#define STOKER_UNPACKER "kernels_cpu/formats/unpack/q6_k.h"
#include "kernels_cpu/isa/tile_arm64.h"
#include "kernels_cpu/isa/tile_x86.h"

namespace stoker {
namespace {

struct BlockQ6_K {
  uint8_t ql[128];    // bits 0..3 of v: nibble c / 2 of byte 64 * h + 32 * (c % 2) + l
  uint8_t qh[64];     // bits 4 and 5: bits 2c, 2c + 1 of byte 32 * h + l
  int8_t scales[16];  // sc of each group
  uint8_t d[2];       // f16 scale of the scales
};
static_assert(sizeof(BlockQ6_K) == 210);

struct Q6_K {
  using Block = BlockQ6_K;
  static constexpr int kBlock = 256;
  static constexpr int kGroup = 16;
  static constexpr bool kOffset = false;

  static void unpack(const Block& b, int g, int8_t* q, float* s, float* m) {
    const int h = g / 8, c = g % 8 / 2, l = 16 * (g % 2);
    const uint8_t* ql = b.ql + 64 * h + 32 * (c % 2) + l;
    const uint8_t* qh = b.qh + 32 * h + l;
    for (int j = 0; j < 16; ++j) {
      const int v = (ql[j] >> 4 * (c / 2) & 15) | (qh[j] >> 2 * c & 3) << 4;
      q[j] = static_cast<int8_t>(v - 32);
    }
    *s = load_f16(b.d) * static_cast<float>(b.scales[g]);
    *m = 0;
  }
};

void quantize(const float* src, uint8_t* dst, int64_t n, const float* importance) {
  auto* block = reinterpret_cast<BlockQ6_K*>(dst);
  for (int64_t i = 0; i < n; i += 256, ++block) {
    const float* weight = importance == nullptr ? nullptr : importance + i;
    ScaledGroups<16> groups;
    quantize_scaled_groups<16>(src + i, weight, LinearCodes::of_bits(6), -128, 127, &groups);
    *block = {};
    store_f16(block->d, groups.d);
    for (int g = 0; g < 16; ++g) block->scales[g] = static_cast<int8_t>(groups.scale[g]);
    for (int k = 0; k < 256; ++k) {
      const int v = static_cast<int>(groups.code[k]) + 32;
      const int h = k / 128, c = k % 128 / 32, l = k % 32;
      block->ql[64 * h + 32 * (c % 2) + l] |= static_cast<uint8_t>((v & 15) << 4 * (c / 2));
      block->qh[32 * h + l] |= static_cast<uint8_t>(v >> 4 << 2 * c);
    }
  }
}

}  // namespace

const Format kFormat_Q6_K = {"Q6_K",
                             FormatId::Q6_K,
                             256,
                             210,
                             ActKind::i8,
                             dequantize_scalar<Q6_K>,
                             quantize,
                             {
                                 matmul_scalar<Q6_K>,
                                 STOKER_X86_MATMUL,
                                 STOKER_ARM64_MATMUL,
                             }};

}  // namespace stoker
