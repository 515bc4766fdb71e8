#include "runtime/core/model/family.h"

#include <string>

#include "runtime/base/errors.h"
#include "runtime/base/printable.h"

namespace stoker {

const char* tensor_kind_name(TensorKind kind) {
  constexpr const char* kNames[kTensorKinds] = {
      "experts",      "shared experts", "routers", "norms", "attention",
      "feed-forward", "embeddings",     "output",  "other",
  };
  return kNames[static_cast<int>(kind)];
}

const Family& find_family(const GgufFile& file, std::string_view architecture) {
  std::string_view base = architecture;
  if (base.starts_with(kPregatedPrefix)) base.remove_prefix(kPregatedPrefix.size());
  std::string known;
  for (const NamedFamily& row : families()) {
    if (base == row.architecture) return *row.family;
    known += (known.empty() ? "" : " ") + std::string(row.architecture);
  }
  throw Error(ErrorKind::kUnsupported, file.path() + ": general.architecture: expected one of " +
                                           known + ", found " +
                                           printable(std::string(architecture)));
}

}  // namespace stoker
