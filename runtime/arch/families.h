// The families that archs.inc names.
#pragma once

#include "runtime/arch/tensors.h"
#include "runtime/core/model/family.h"
#include "runtime/core/forward.h"

namespace stoker {

#define STOKER_ARCH(name, family) extern const Family kFamily_##family;
#include "runtime/arch/archs.inc"
#undef STOKER_ARCH

// Runs the layer that most families share: norm, attention, norm, feed-forward or mixture, with a
// sum after each of the two blocks.
void standard_layer(Forward& f, int64_t il);

}  // namespace stoker
