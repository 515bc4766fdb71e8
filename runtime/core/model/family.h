// A model family: how its files are read and what its layers do. Families are in runtime/arch,
// which uses the core and defines families(); the core knows them by this table alone.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "runtime/core/model/config.h"
#include "runtime/core/model/tensor_row.h"

namespace stoker {

class Forward;

struct Family {
  // Completes what read_config() has read.
  void (*configure)(const GgufFile& file, ModelConfig& config);
  // Runs layer `il` on the residual stream.
  void (*layer)(Forward& forward, int64_t il);
  TensorTable tensors;
};

struct NamedFamily {
  std::string_view architecture;  // general.architecture of its files
  const Family* family;
};

// Returns all families of archs.inc, in its order.
std::span<const NamedFamily> families();

// A prefix of an architecture's name: its layers' experts are chosen a layer ahead.
constexpr std::string_view kPregatedPrefix = "pregated-";

// Returns the family of a file. Throws Error(kUnsupported).
const Family& find_family(const GgufFile& file, std::string_view architecture);

}  // namespace stoker
