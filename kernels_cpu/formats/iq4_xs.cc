// IQ4_XS: 256 weights of 4 bits that index the table of IQ4_NL, in 8 groups of 32 with 6-bit
// scales. w = d * (sc - 32) * kIq4Codes[v].
#include "kernels_cpu/formats/format_table.h"
#include "kernels_cpu/formats/packing.h"
#include "kernels_cpu/formats/search.h"
#include "kernels_cpu/fp16.h"
#include "kernels_cpu/isa/tile_scalar.h"

#define STOKER_UNPACKER "kernels_cpu/formats/unpack/iq4_xs.h"
#include "kernels_cpu/isa/tile_arm64.h"
#include "kernels_cpu/isa/tile_x86.h"

namespace stoker {
namespace {

struct BlockIQ4_XS {
  uint8_t d[2];         // f16 scale of the scales
  uint8_t scales_h[2];  // bits 4 and 5 of sc: group g is bits 2g, 2g + 1 of the little-endian word
  uint8_t scales_l[4];  // bits 0..3: nibble g % 2 of byte g / 2
  uint8_t qs[128];      // v: weight 32 * g + j in the low nibble of byte 16 * g + j, 16 + j high
};
static_assert(sizeof(BlockIQ4_XS) == 136);

struct IQ4_XS {
  using Block = BlockIQ4_XS;
  static constexpr int kBlock = 256;
  static constexpr int kGroup = 32;
  static constexpr bool kOffset = false;

  static void unpack(const Block& b, int g, int8_t* q, float* s, float* m) {
    unpack_nibbles32(b.qs + 16 * g, q, kIq4Codes);
    const int sc = (b.scales_l[g / 2] >> 4 * (g % 2) & 15) | (load_u16(b.scales_h) >> 2 * g & 3)
                                                                 << 4;
    *s = load_f16(b.d) * static_cast<float>(sc - 32);
    *m = 0;
  }
};

void quantize(const float* src, uint8_t* dst, int64_t n, const float* importance) {
  auto* block = reinterpret_cast<BlockIQ4_XS*>(dst);
  for (int64_t i = 0; i < n; i += 256, ++block) {
    const float* weight = importance == nullptr ? nullptr : importance + i;
    ScaledGroups<32> groups;
    quantize_scaled_groups<32>(src + i, weight, Iq4Codes{}, -32, 31, &groups);
    *block = {};
    store_f16(block->d, groups.d);
    uint16_t high = 0;
    for (int g = 0; g < 8; ++g) {
      const int sc = groups.scale[g] + 32;
      block->scales_l[g / 2] |= static_cast<uint8_t>((sc & 15) << 4 * (g % 2));
      high |= static_cast<uint16_t>(sc >> 4 << 2 * g);
      uint8_t code[32];
      for (int j = 0; j < 32; ++j) code[j] = iq4_index(groups.code[32 * g + j]);
      pack_nibbles32(code, block->qs + 16 * g);
    }
    store_u16(block->scales_h, high);
  }
}

}  // namespace

const Format kFormat_IQ4_XS = {"IQ4_XS",
                               FormatId::IQ4_XS,
                               256,
                               136,
                               ActKind::i8,
                               dequantize_scalar<IQ4_XS>,
                               quantize,
                               {
                                   matmul_scalar<IQ4_XS>,
                                   STOKER_X86_MATMUL,
                                   STOKER_ARM64_MATMUL,
                               }};

}  // namespace stoker
