// arm64 kernels of one format: a formats/<format>.cc sets STOKER_UNPACKER to the header with its
// unpacker (see tile_matmul.h) and includes this once, at file level; STOKER_ARM64_MATMUL is then
// the format's neon and i8mm entries of Format::matmul.
#include <cstddef>
#include <cstdint>

#include "kernels_cpu/kernel.h"
#include "kernels_cpu/target.h"
#include "kernels_cpu/isa/tile_blocking.h"

#if defined(STOKER_ARM64)

STOKER_BEGIN_NEON
namespace stoker::neon {
#define STOKER_I8MM 0
#include "kernels_cpu/isa/tile_neon.h"
#include "kernels_cpu/isa/tile_matmul.h"
#include "kernels_cpu/isa/tile_packing.h"
namespace {
#include STOKER_UNPACKER
}
#undef STOKER_I8MM
}  // namespace stoker::neon
STOKER_END_TARGET

STOKER_BEGIN_I8MM
namespace stoker::i8mm {
#define STOKER_I8MM 1
#include "kernels_cpu/isa/tile_neon.h"
#include "kernels_cpu/isa/tile_matmul.h"
#include "kernels_cpu/isa/tile_packing.h"
namespace {
#include STOKER_UNPACKER
}
#undef STOKER_I8MM
}  // namespace stoker::i8mm
STOKER_END_TARGET

#define STOKER_ARM64_MATMUL neon::matmul<neon::Unpack>, i8mm::matmul<i8mm::Unpack>
#else
#define STOKER_ARM64_MATMUL nullptr, nullptr
#endif
