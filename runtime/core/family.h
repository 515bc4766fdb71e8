// A model family: how its files are read and what its layers do. Families are in the room above
// (runtime/arch), which defines families(); the core knows them by this table alone.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "runtime/core/config.h"

namespace stoker {

class Forward;

struct Family {
  // Completes what read_config() has read.
  void (*configure)(const GgufFile& file, ModelConfig& config);
  // Runs layer `il` on the residual stream.
  void (*layer)(Forward& forward, int64_t il);
};

struct NamedFamily {
  std::string_view architecture;  // general.architecture of its files
  const Family* family;
};

// All of archs.inc, in its order.
std::span<const NamedFamily> families();

}  // namespace stoker
