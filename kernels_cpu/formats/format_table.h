// The rows of the kernel table: `const Format kFormat_<name>`, one a file of kernels_cpu/formats.
#pragma once

#include "kernels_cpu/kernel.h"
#include "kernels_cpu/target.h"

namespace stoker {

#define STOKER_FORMAT(name, id, block, bytes) extern const Format kFormat_##name;
#include "kernels_cpu/formats.inc"
#undef STOKER_FORMAT

}  // namespace stoker

// Each macro gives an entry of Format::matmul: the kernel where this platform has the ISA, else
// null.
#if defined(STOKER_X86)
#define STOKER_ON_X86(kernel) kernel
#else
#define STOKER_ON_X86(kernel) nullptr
#endif
#if defined(STOKER_ARM64)
#define STOKER_ON_ARM64(kernel) kernel
#else
#define STOKER_ON_ARM64(kernel) nullptr
#endif
