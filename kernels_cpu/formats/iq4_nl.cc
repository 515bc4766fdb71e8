// IQ4_NL: 32 weights of 4 bits that index a fixed non-linear table. w = d * kIq4Codes[v].
#include "kernels_cpu/format_table.h"
#include "kernels_cpu/formats/packing.h"
#include "kernels_cpu/fp16.h"
#include "kernels_cpu/tile_scalar.h"

namespace stoker {
namespace {

struct BlockIQ4_NL {
  uint8_t d[2];    // f16 scale
  uint8_t qs[16];  // v, 0..15: weight j in the low nibble of byte j, weight 16 + j in the high one
};
static_assert(sizeof(BlockIQ4_NL) == 18);

struct IQ4_NL {
  using Block = BlockIQ4_NL;
  static constexpr int kBlock = 32;
  static constexpr int kGroup = 32;
  static constexpr bool kOffset = false;

  static void unpack(const Block& b, int, int8_t* q, float* s, float* m) {
    unpack_nibbles32(b.qs, q, kIq4Codes);
    *s = load_f16(b.d);
    *m = 0;
  }
};

}  // namespace

const Format kFormat_IQ4_NL = {
    "IQ4_NL",
    FormatId::IQ4_NL,
    32,
    18,
    ActKind::i8,
    dequantize_scalar<IQ4_NL>,
    nullptr,
    {
        matmul_scalar<IQ4_NL>,
        STOKER_ON_X86(nullptr),    // avx2
        STOKER_ON_X86(nullptr),    // avxvnni
        STOKER_ON_X86(nullptr),    // avx512
        STOKER_ON_ARM64(nullptr),  // neon
        STOKER_ON_ARM64(nullptr),  // i8mm
    }};

}  // namespace stoker
