// Q8_0: 32 weights of 8 bits. w = d * q.
#include <cmath>

#include "kernels_cpu/formats/format_table.h"
#include "kernels_cpu/formats/search.h"
#include "kernels_cpu/fp16.h"
#include "kernels_cpu/isa/tile_scalar.h"

#define STOKER_UNPACKER "kernels_cpu/formats/unpack/q8_0.h"
#include "kernels_cpu/isa/tile_arm64.h"
#include "kernels_cpu/isa/tile_x86.h"

namespace stoker {
namespace {

struct BlockQ8_0 {
  uint8_t d[2];   // f16 scale
  int8_t qs[32];  // q
};
static_assert(sizeof(BlockQ8_0) == 34);

struct Q8_0 {
  using Block = BlockQ8_0;
  static constexpr int kBlock = 32;
  static constexpr int kGroup = 32;
  static constexpr bool kOffset = false;

  static void unpack(const Block& b, int, int8_t* q, float* s, float* m) {
    for (int j = 0; j < 32; ++j) q[j] = b.qs[j];
    *s = load_f16(b.d);
    *m = 0;
  }
};

// Rounds halves away from zero, as the published reference quantizer does. Eight bits leave nothing
// for importances to decide.
void quantize(const float* src, uint8_t* dst, int64_t n, const float*) {
  auto* block = reinterpret_cast<BlockQ8_0*>(dst);
  for (int64_t i = 0; i < n; i += 32, ++block) {
    const float d = std::fabs(extreme32(src + i)) / 127;
    const float inv = d < 1e-37f ? 0.0f : 1 / d;
    store_f16(block->d, round_to_f16(d));
    for (int j = 0; j < 32; ++j) {
      block->qs[j] = static_cast<int8_t>(clamp(std::round(src[i + j] * inv), -127, 127));
    }
  }
}

}  // namespace

const Format kFormat_Q8_0 = {"Q8_0",
                             FormatId::Q8_0,
                             32,
                             34,
                             ActKind::i8,
                             dequantize_scalar<Q8_0>,
                             quantize,
                             {
                                 matmul_scalar<Q8_0>,
                                 STOKER_X86_MATMUL,
                                 STOKER_ARM64_MATMUL,
                             }};

}  // namespace stoker
