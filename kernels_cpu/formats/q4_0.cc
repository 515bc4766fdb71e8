// Q4_0: 32 weights of 4 bits. w = d * (v - 8).
#include "kernels_cpu/formats/format_table.h"
#include "kernels_cpu/formats/packing.h"
#include "kernels_cpu/formats/search.h"
#include "kernels_cpu/fp16.h"
#include "kernels_cpu/isa/tile_scalar.h"

#define STOKER_UNPACKER "kernels_cpu/formats/unpack/q4_0.h"
#include "kernels_cpu/isa/tile_arm64.h"
#include "kernels_cpu/isa/tile_x86.h"

namespace stoker {
namespace {

struct BlockQ4_0 {
  uint8_t d[2];    // f16 scale
  uint8_t qs[16];  // v, 0..15: weight j in the low nibble of byte j, weight 16 + j in the high one
};
static_assert(sizeof(BlockQ4_0) == 18);

struct Q4_0 {
  using Block = BlockQ4_0;
  static constexpr int kBlock = 32;
  static constexpr int kGroup = 32;
  static constexpr bool kOffset = false;

  static void unpack(const Block& b, int, int8_t* q, float* s, float* m) {
    unpack_nibbles32(b.qs, q, 8);
    *s = load_f16(b.d);
    *m = 0;
  }
};

void quantize(const float* src, uint8_t* dst, int64_t n, const float* importance) {
  auto* block = reinterpret_cast<BlockQ4_0*>(dst);
  for (int64_t i = 0; i < n; i += 32, ++block) {
    const float* weight = importance == nullptr ? nullptr : importance + i;
    uint8_t code[32];
    store_f16(block->d, quantize_scale32(src + i, weight, 8, code));
    pack_nibbles32(code, block->qs);
  }
}

}  // namespace

const Format kFormat_Q4_0 = {"Q4_0",
                             FormatId::Q4_0,
                             32,
                             18,
                             ActKind::i8,
                             dequantize_scalar<Q4_0>,
                             quantize,
                             {
                                 matmul_scalar<Q4_0>,
                                 STOKER_X86_MATMUL,
                                 STOKER_ARM64_MATMUL,
                             }};

}  // namespace stoker
