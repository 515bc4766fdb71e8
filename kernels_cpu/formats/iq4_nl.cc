// IQ4_NL: 32 weights of 4 bits that index a fixed non-linear table. w = d * kIq4Codes[v].
#include "kernels_cpu/formats/format_table.h"
#include "kernels_cpu/formats/packing.h"
#include "kernels_cpu/formats/search.h"
#include "kernels_cpu/fp16.h"
#include "kernels_cpu/isa/tile_scalar.h"

#define STOKER_UNPACKER "kernels_cpu/formats/unpack/iq4_nl.h"
#include "kernels_cpu/isa/tile_arm64.h"
#include "kernels_cpu/isa/tile_x86.h"

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

void quantize(const float* src, uint8_t* dst, int64_t n, const float* importance) {
  auto* block = reinterpret_cast<BlockIQ4_NL*>(dst);
  for (int64_t i = 0; i < n; i += 32, ++block) {
    const float* weight = importance == nullptr ? nullptr : importance + i;
    const Scaled<32> v(src + i, weight);
    const float d = v.zero ? 0.0f : v.rounded(fit_scale<32>(v.x, v.weight, Iq4Codes{}));
    const float inv = inverse(d);
    uint8_t code[32];
    for (int j = 0; j < 32; ++j) code[j] = iq4_index(Iq4Codes{}(v.x[j] * inv));
    store_f16(block->d, v.in_source_units(d));
    pack_nibbles32(code, block->qs);
  }
}

}  // namespace

const Format kFormat_IQ4_NL = {"IQ4_NL",
                               FormatId::IQ4_NL,
                               32,
                               18,
                               ActKind::i8,
                               dequantize_scalar<IQ4_NL>,
                               quantize,
                               {
                                   matmul_scalar<IQ4_NL>,
                                   STOKER_X86_MATMUL,
                                   STOKER_ARM64_MATMUL,
                               }};

}  // namespace stoker
