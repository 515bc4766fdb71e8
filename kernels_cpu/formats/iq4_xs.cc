// IQ4_XS: 256 weights of 4 bits that index the table of IQ4_NL, in 8 groups of 32 with 6-bit scales.
// w = d * (sc - 32) * kIq4Codes[v].
#include "kernels_cpu/format_table.h"
#include "kernels_cpu/formats/packing.h"
#include "kernels_cpu/fp16.h"
#include "kernels_cpu/tile_scalar.h"

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
    const int sc = (b.scales_l[g / 2] >> 4 * (g % 2) & 15) | (load_u16(b.scales_h) >> 2 * g & 3) << 4;
    *s = load_f16(b.d) * static_cast<float>(sc - 32);
    *m = 0;
  }
};

}  // namespace

const Format kFormat_IQ4_XS = {
    "IQ4_XS",
    FormatId::IQ4_XS,
    256,
    136,
    ActKind::i8,
    dequantize_scalar<IQ4_XS>,
    nullptr,
    {
        matmul_scalar<IQ4_XS>,
        STOKER_ON_X86(nullptr),    // avx2
        STOKER_ON_X86(nullptr),    // avxvnni
        STOKER_ON_X86(nullptr),    // avx512
        STOKER_ON_ARM64(nullptr),  // neon
        STOKER_ON_ARM64(nullptr),  // i8mm
    }};

}  // namespace stoker
