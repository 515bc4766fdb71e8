#include "kernels_cpu/ops/ops.h"

#include <cmath>
#include <cstring>

#include "kernels_cpu/target.h"
#include "kernels_cpu/isa/vec_avx2.h"
#include "kernels_cpu/isa/vec_avx512.h"
#include "kernels_cpu/isa/vec_neon.h"
#include "kernels_cpu/isa/vec_scalar.h"

namespace stoker {

// The scratch holds, for up to 4 rows at once, the scores (later the weights) of one block and the
// running outputs.
int64_t attention_scratch_floats(int64_t head_dim_v) {
  return 4 * (kAttentionBlock + head_dim_v + 16);
}

namespace {
constexpr float kLanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
}  // namespace

namespace scalar_ops {
using V = ScalarVec;
constexpr int kRows = 2, kVecs = 2;
#include "kernels_cpu/ops/ops_body.inc"
}  // namespace scalar_ops

#if STOKER_X86
STOKER_BEGIN_AVX2
namespace avx2_ops {
using V = Avx2Vec;
constexpr int kRows = 2, kVecs = 2;
#include "kernels_cpu/ops/ops_body.inc"
}  // namespace avx2_ops
STOKER_END_TARGET
STOKER_BEGIN_AVX512
namespace avx512_ops {
using V = Avx512Vec;
constexpr int kRows = 4, kVecs = 4;
#include "kernels_cpu/ops/ops_body.inc"
}  // namespace avx512_ops
STOKER_END_TARGET
#endif

#if STOKER_ARM64
STOKER_BEGIN_NEON
namespace neon_ops {
using V = NeonVec;
constexpr int kRows = 2, kVecs = 2;
#include "kernels_cpu/ops/ops_body.inc"
}  // namespace neon_ops
STOKER_END_TARGET
#endif

const Ops& ops_for(Isa isa) {
  switch (isa) {
#if STOKER_X86
    case Isa::avx512:
      return avx512_ops::kOps;
    case Isa::avx2:
    case Isa::avxvnni:
      return avx2_ops::kOps;
#endif
#if STOKER_ARM64
    case Isa::neon:
    case Isa::i8mm:
      return neon_ops::kOps;
#endif
    default:
      return scalar_ops::kOps;
  }
}

}  // namespace stoker
