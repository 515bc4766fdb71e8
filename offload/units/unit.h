// A unit is what is fetched from flash and cached as one: an expert of a layer.
#pragma once

#include <cstdint>

namespace stoker {

// The number of a unit: layer * n_expert + expert.
using UnitId = int32_t;

// The bytes of a file that belong to a unit.
struct Extent {
  int32_t shard = 0;
  uint64_t offset = 0;
  uint64_t bytes = 0;
};

}  // namespace stoker
