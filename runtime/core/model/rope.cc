#include "runtime/core/model/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace stoker {

Rope::Rope(const RopeConfig& c, double base, bool scaled, const std::vector<float>& factors) {
  const int64_t half = c.n_rot / 2;
  const double n_rot = static_cast<double>(c.n_rot);
  const bool yarn = scaled && c.scaling == RopeScaling::kYarn;
  // YaRN: frequencies that turn more than beta_fast times within the original context keep their
  // speed, those below beta_slow are interpolated, with a ramp between.
  double low = 0, high = 0;
  if (yarn) {
    const auto dimension = [&](double turns) {
      return n_rot *
             std::log(static_cast<double>(c.original_context) / (turns * 2 * std::numbers::pi)) /
             (2 * std::log(base));
    };
    low = std::max(0.0, std::floor(dimension(c.beta_fast)));
    high = std::min(n_rot - 1, std::ceil(dimension(c.beta_slow)));
  }
  for (int64_t i = 0; i < half; ++i) {
    double f = std::pow(base, -2.0 * static_cast<double>(i) / n_rot);
    if (!factors.empty()) f /= static_cast<double>(factors[static_cast<size_t>(i)]);
    if (scaled && c.scaling != RopeScaling::kLongRope) {
      double keep = 0;
      if (yarn) {
        const double x = (static_cast<double>(i) - low) / std::max(0.001, high - low);
        keep = 1 - std::clamp(x, 0.0, 1.0);
      }
      f = f / c.factor * (1 - keep) + f * keep;
    }
    frequency_.push_back(f);
  }
  if (scaled) magnitude_ = c.attention_factor;
  if (yarn) magnitude_ *= 1 + 0.1 * std::log(c.factor);
}

void Rope::angles(int64_t position, float* cos_sin) const {
  const size_t half = frequency_.size();
  for (size_t i = 0; i < half; ++i) {
    const double a = static_cast<double>(position) * frequency_[i];
    cos_sin[i] = static_cast<float>(std::cos(a) * magnitude_);
    cos_sin[half + i] = static_cast<float>(std::sin(a) * magnitude_);
  }
}

}  // namespace stoker
