// Rotary position embedding: the angles of a position. Linear scaling, YaRN (arXiv 2309.00071),
// long-context factors (arXiv 2402.13753) and Llama 3's frequency divisors.
#pragma once

#include <cstdint>
#include <vector>

#include "runtime/core/model/config.h"

namespace stoker {

class Rope {
 public:
  Rope() = default;
  // factors: [n_rot / 2] divisors of the frequencies, or empty. scaled false: a sliding-window
  // layer's plain embedding of base `base`.
  Rope(const RopeConfig& config, double base, bool scaled, const std::vector<float>& factors);
  // cos_sin: [2][n_rot / 2]
  void angles(int64_t position, float* cos_sin) const;
  int64_t size() const { return static_cast<int64_t>(frequency_.size()); }

 private:
  std::vector<double> frequency_;  // [n_rot / 2] radians a position, scaling included
  double magnitude_ = 1.0;         // multiplies cos and sin
};

}  // namespace stoker
