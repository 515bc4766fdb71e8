// x86 kernels of one format: a formats/<format>.cc sets STOKER_UNPACKER to the header with its
// unpacker (struct Unpack, written in the vector operations of tile_avx512.h) and includes this
// once, at file level; STOKER_X86_MATMUL is then the format's avx2, avxvnni and avx512 entries of
// Format::matmul. The unpacker is compiled three times, once per instruction set.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels_cpu/kernel.h"
#include "kernels_cpu/target.h"
#include "kernels_cpu/isa/tile_blocking.h"

#if defined(STOKER_X86)
// clang-format off: the order of the includes matters
STOKER_BEGIN_AVX2
namespace stoker::avx2 {
#define STOKER_VNNI 0
#include "kernels_cpu/isa/tile_avx2.h"
#include "kernels_cpu/isa/tile_matmul.h"
#include "kernels_cpu/isa/tile_packing.h"
namespace {
#include STOKER_UNPACKER
}
#undef STOKER_VNNI
}  // namespace stoker::avx2
STOKER_END_TARGET

STOKER_BEGIN_AVXVNNI
namespace stoker::avxvnni {
#define STOKER_VNNI 1
#include "kernels_cpu/isa/tile_avx2.h"
#include "kernels_cpu/isa/tile_matmul.h"
#include "kernels_cpu/isa/tile_packing.h"
namespace {
#include STOKER_UNPACKER
}
#undef STOKER_VNNI
}  // namespace stoker::avxvnni
STOKER_END_TARGET

STOKER_BEGIN_AVX512
namespace stoker::avx512 {
#include "kernels_cpu/isa/tile_avx512.h"
#include "kernels_cpu/isa/tile_matmul.h"
#include "kernels_cpu/isa/tile_packing.h"
namespace {
#include STOKER_UNPACKER
}
}  // namespace stoker::avx512
STOKER_END_TARGET
// clang-format on

#define STOKER_X86_MATMUL \
  avx2::matmul<avx2::Unpack>, avxvnni::matmul<avxvnni::Unpack>, avx512::matmul<avx512::Unpack>
#else
#define STOKER_X86_MATMUL nullptr, nullptr, nullptr
#endif
