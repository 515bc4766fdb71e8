// Q8_0: 32 weights of 8 bits. w = d * q.
#include "kernels_cpu/format_table.h"
#include "kernels_cpu/fp16.h"
#include "kernels_cpu/tile_scalar.h"

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

}  // namespace

const Format kFormat_Q8_0 = {
    "Q8_0",
    FormatId::Q8_0,
    32,
    34,
    ActKind::i8,
    dequantize_scalar<Q8_0>,
    nullptr,
    {
        matmul_scalar<Q8_0>,
        STOKER_ON_X86(nullptr),    // avx2
        STOKER_ON_X86(nullptr),    // avxvnni
        STOKER_ON_X86(nullptr),    // avx512
        STOKER_ON_ARM64(nullptr),  // neon
        STOKER_ON_ARM64(nullptr),  // i8mm
    }};

}  // namespace stoker
