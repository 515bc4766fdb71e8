// Q5_0: 32 weights of 5 bits. w = d * (v - 16).
#include "kernels_cpu/formats/format_table.h"
#include "kernels_cpu/formats/packing.h"
#include "kernels_cpu/formats/search.h"
#include "kernels_cpu/fp16.h"
#include "kernels_cpu/isa/tile_scalar.h"

#define STOKER_UNPACKER "kernels_cpu/formats/unpack/q5_0.h"
#include "kernels_cpu/isa/tile_arm64.h"
#include "kernels_cpu/isa/tile_x86.h"

namespace stoker {
namespace {

struct BlockQ5_0 {
  uint8_t d[2];    // f16 scale
  uint8_t qh[4];   // bit 4 of v: weight j is bit j of the little-endian word
  uint8_t qs[16];  // bits 0..3 of v: weight j in the low nibble of byte j, 16 + j in the high one
};
static_assert(sizeof(BlockQ5_0) == 22);

struct Q5_0 {
  using Block = BlockQ5_0;
  static constexpr int kBlock = 32;
  static constexpr int kGroup = 32;
  static constexpr bool kOffset = false;

  static void unpack(const Block& b, int, int8_t* q, float* s, float* m) {
    unpack_five_bits32(b.qs, load_u32(b.qh), q, 16);
    *s = load_f16(b.d);
    *m = 0;
  }
};

void quantize(const float* src, uint8_t* dst, int64_t n, const float* importance) {
  auto* block = reinterpret_cast<BlockQ5_0*>(dst);
  for (int64_t i = 0; i < n; i += 32, ++block) {
    const float* weight = importance == nullptr ? nullptr : importance + i;
    uint8_t code[32];
    store_f16(block->d, quantize_scale32(src + i, weight, 16, code));
    store_u32(block->qh, pack_five_bits32(code, block->qs));
  }
}

}  // namespace

const Format kFormat_Q5_0 = {"Q5_0",
                             FormatId::Q5_0,
                             32,
                             22,
                             ActKind::i8,
                             dequantize_scalar<Q5_0>,
                             quantize,
                             {
                                 matmul_scalar<Q5_0>,
                                 STOKER_X86_MATMUL,
                                 STOKER_ARM64_MATMUL,
                             }};

}  // namespace stoker
