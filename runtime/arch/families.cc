#include "runtime/arch/families.h"

namespace stoker {

std::span<const NamedFamily> families() {
  static const NamedFamily kAll[] = {
#define STOKER_ARCH(name, family) {name, &kFamily_##family},
#include "runtime/arch/archs.inc"
#undef STOKER_ARCH
  };
  return kAll;
}

}  // namespace stoker
