// Q4_K: 256 weights of 4 bits in 8 groups of 32, whose 6-bit scales and minima are themselves
// scaled. w = d * sc * v - dmin * mn.
#include "kernels_cpu/formats/format_table.h"
#include "kernels_cpu/formats/packing.h"
#include "kernels_cpu/formats/search.h"
#include "kernels_cpu/fp16.h"
#include "kernels_cpu/isa/tile_scalar.h"

#define STOKER_UNPACKER "kernels_cpu/formats/unpack/q4_k.h"
#include "kernels_cpu/isa/tile_arm64.h"
#include "kernels_cpu/isa/tile_x86.h"

namespace stoker {
namespace {

struct BlockQ4_K {
  uint8_t d[2];        // f16 scale of the scales
  uint8_t dmin[2];     // f16 scale of the minima
  uint8_t scales[12];  // sc and mn, packed as packing.h says
  uint8_t qs[128];     // v, 0..15: weight 64 * i + l in the low nibble of byte 32 * i + l (l < 32),
                       // weight 64 * i + 32 + l in the high one
};
static_assert(sizeof(BlockQ4_K) == 144);

struct Q4_K {
  using Block = BlockQ4_K;
  static constexpr int kBlock = 256;
  static constexpr int kGroup = 32;
  static constexpr bool kOffset = true;

  static void unpack(const Block& b, int g, int8_t* q, float* s, float* m) {
    const uint8_t* qs = b.qs + 32 * (g / 2);
    const int shift = 4 * (g % 2);
    for (int j = 0; j < 32; ++j) q[j] = static_cast<int8_t>(qs[j] >> shift & 15);
    int sc, mn;
    unpack_scale_min6(b.scales, g, &sc, &mn);
    *s = load_f16(b.d) * static_cast<float>(sc);
    *m = -(load_f16(b.dmin) * static_cast<float>(mn));
  }
};

void quantize(const float* src, uint8_t* dst, int64_t n, const float* importance) {
  auto* block = reinterpret_cast<BlockQ4_K*>(dst);
  for (int64_t i = 0; i < n; i += 256, ++block) {
    const float* weight = importance == nullptr ? nullptr : importance + i;
    AffineGroups<32> groups;
    quantize_affine_groups<32>(src + i, weight, 15, 63, &groups);
    store_f16(block->d, groups.d);
    store_f16(block->dmin, groups.dmin);
    pack_scale_min6(groups.scale, groups.min, block->scales);
    for (int k = 0; k < 128; ++k) {
      const uint8_t* code = groups.code + 64 * (k / 32) + k % 32;
      block->qs[k] = static_cast<uint8_t>(code[0] | code[32] << 4);
    }
  }
}

}  // namespace

const Format kFormat_Q4_K = {"Q4_K",
                             FormatId::Q4_K,
                             256,
                             144,
                             ActKind::i8,
                             dequantize_scalar<Q4_K>,
                             quantize,
                             {
                                 matmul_scalar<Q4_K>,
                                 STOKER_X86_MATMUL,
                                 STOKER_ARM64_MATMUL,
                             }};

}  // namespace stoker
