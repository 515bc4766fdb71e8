// The choice of the layers with a sliding window: sliding_window_pattern is a period, or one flag a
// layer.
#pragma once

#include <cstdint>
#include <vector>

#include "runtime/core/model/config.h"
#include "runtime/base/errors.h"

namespace stoker {

// Sets c.sliding. With dense_first the first layer of each period is global, else the last one is.
inline void set_sliding_layers(const GgufFile& file, ModelConfig& c, int64_t period,
                               bool dense_first) {
  const std::string key = c.architecture + ".attention.sliding_window_pattern";
  const size_t n = static_cast<size_t>(c.n_layer);
  if (c.sliding_window == 0) return;
  if (const GgufValue* v = file.find(key)) {
    if (v->is_array()) {
      const std::vector<int64_t> flags = v->as_int_array();
      if (flags.size() < n) {
        throw Error(ErrorKind::kModelFile, file.path() + ": " + key + ": expected " +
                                               std::to_string(n) + " flags, found " +
                                               std::to_string(flags.size()));
      }
      for (size_t il = 0; il < n; ++il) c.sliding[il] = flags[il] != 0;
      return;
    }
    period = v->as_int();
  }
  for (size_t il = 0; il < n; ++il) {
    const int64_t at = period > 0 ? static_cast<int64_t>(il) % period : 0;
    // A period of 0 makes every layer slide.
    c.sliding[il] = period <= 0 || (dense_first ? at != 0 : at != period - 1);
  }
}

}  // namespace stoker
