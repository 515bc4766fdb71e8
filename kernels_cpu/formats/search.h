// The choice of scales, offsets and codes when quantizing: weighted least squares over candidate
// grids.
//
// A group of n weights x becomes scale * code (+ offset). For given codes the best scale and
// offset are a linear least-squares solution; for a given scale and offset the best codes are the
// nearest ones. The search tries a range of starting grids around the one that just spans the
// group, solves, takes the nearest codes once more, solves again, and keeps the smallest weighted
// squared error. Blocks whose scales are themselves quantized then choose each group's small
// integers by trying the neighbours of the rounded ones, with the block's rounded f16 scale.
//
// All values are divided by a power of two first, so that nothing overflows. Sums run in eight
// fixed lanes, which gives the same bytes on every platform.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels_cpu/fp16.h"

namespace stoker {

// Returns the sum of f(i), i < n (a multiple of 8).
template <int n, class F>
inline float lane_sum(F f) {
  float s[8] = {};
  for (int i = 0; i < n; i += 8) {
    for (int j = 0; j < 8; ++j) s[j] += f(i + j);
  }
  return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
}

// Returns the nearest integer, ties to even; |v| < 2^22. (Unlike nearbyint it needs no instruction
// beyond the baseline and is vectorized.)
inline float nearest(float v) { return (v + 12582912.0f) - 12582912.0f; }

// Returns v held in low..high; a NaN gives low, so that no conversion to an integer is undefined
// (callers refuse numbers that are not finite; whatever slips through gives some valid block).
inline float clamp(float v, float low, float high) { return std::min(std::max(low, v), high); }

// Codes low..high in steps of 1.
struct LinearCodes {
  float low, high;
  float step;  // of the candidate grids, relative to the spanning one
  static constexpr LinearCodes of_bits(int bits) {
    const float half = static_cast<float>(1 << (bits - 1));
    return {-half, half - 1, 0.1f / half};
  }
  float operator()(float v) const { return nearest(clamp(v, low, high)); }
};

// Returns v rounded to what an f16 field holds; values beyond its range are held at the largest.
inline float round_to_f16(float v) { return f16_to_f32(f32_to_f16(clamp(v, -65504.0f, 65504.0f))); }

// The n source values times 2^-exponent, and the weights of their squared errors. Without
// importances large values count a little more than small ones; zero importances still count a
// little.
template <int n>
struct Scaled {
  float x[n];
  float weight[n];
  int exponent;  // 2^exponent > max |source|
  bool zero;     // nothing but zeros

  Scaled(const float* source, const float* importance) {
    float largest = 0, heaviest = 0;
    for (int i = 0; i < n; ++i) largest = std::max(largest, std::fabs(source[i]));
    zero = !(largest > 0);
    std::frexp(largest, &exponent);
    for (int i = 0; i < n; ++i) x[i] = std::ldexp(source[i], -exponent);
    if (importance != nullptr) {
      for (int i = 0; i < n; ++i) heaviest = std::max(heaviest, importance[i]);
    }
    if (heaviest > 0) {
      const float unit = heaviest < 1e-30f ? 1e30f : 1 / heaviest;
      for (int i = 0; i < n; ++i) weight[i] = importance[i] * unit + 1e-4f;
    } else {
      const float rms = std::sqrt(lane_sum<n>([&](int i) { return x[i] * x[i]; }) / n);
      for (int i = 0; i < n; ++i) weight[i] = rms + std::fabs(x[i]);
    }
  }

  // Returns a scale of the divided values as the block's f16 field will hold it: it is rounded in
  // the units of the source and given in the divided ones.
  float rounded(float scale) const {
    return std::ldexp(round_to_f16(std::ldexp(scale, exponent)), -exponent);
  }
  float in_source_units(float scale) const { return std::ldexp(scale, exponent); }
};

// Returns 1 / scale for choosing codes; 0 where the scale is 0 (every code is then the one nearest
// 0).
inline float inverse(float scale) { return std::fabs(scale) < 1e-30f ? 0.0f : 1 / scale; }

// Returns the scale that fits x[n] ~ scale * code best.
template <int n, class Codes>
float fit_scale(const float* x, const float* weight, const Codes& codes) {
  float extreme = 0;
  for (int i = 0; i < n; ++i) {
    if (std::fabs(x[i]) > std::fabs(extreme)) extreme = x[i];
  }
  if (std::fabs(extreme) < 1e-20f) return 0;
  float best = 0, best_gain = 0;  // gain: how much of sum w x^2 the codes explain
  const auto attempt = [&](float inv) {
    float code[n];
    for (int i = 0; i < n; ++i) code[i] = codes(x[i] * inv);
    const float xc = lane_sum<n>([&](int i) { return weight[i] * x[i] * code[i]; });
    const float cc = lane_sum<n>([&](int i) { return weight[i] * code[i] * code[i]; });
    if (!(cc > 0)) return 0.0f;
    if (xc * xc / cc > best_gain) {
      best_gain = xc * xc / cc;
      best = xc / cc;
    }
    return xc / cc;
  };
  for (int i = -9; i <= 9; ++i) {
    for (const float limit : {codes.low, codes.high}) {
      const float before = best_gain;
      const float scale = attempt(limit * (1 + codes.step * static_cast<float>(i)) / extreme);
      if (best_gain > before) attempt(inverse(scale));
    }
  }
  return best;
}

// Finds the scale >= 0 and the offset that fit x[n] ~ scale * code + offset best, code 0..top.
template <int n>
void fit_affine(const float* x, const float* weight, int top, bool offset_below_zero, float* scale,
                float* offset) {
  float low = x[0], high = x[0];
  for (int i = 1; i < n; ++i) {
    low = std::min(low, x[i]);
    high = std::max(high, x[i]);
  }
  if (offset_below_zero) low = std::min(low, 0.0f);
  *scale = 0;
  *offset = low;
  if (!(high - low > 1e-20f)) return;
  const float limit = static_cast<float>(top);
  const float w = lane_sum<n>([&](int i) { return weight[i]; });
  const float wx = lane_sum<n>([&](int i) { return weight[i] * x[i]; });
  float best_error = INFINITY;
  for (int step = -10; step <= 10; ++step) {
    float s = (high - low) / (limit + 0.1f * static_cast<float>(step) * std::min(limit / 7, 1.0f));
    float o = low;
    for (int pass = 0; pass < 2; ++pass) {
      float code[n];
      const float inv = inverse(s);
      for (int i = 0; i < n; ++i) {
        code[i] = nearest(clamp((x[i] - o) * inv, 0.0f, limit));
      }
      const float wc = lane_sum<n>([&](int i) { return weight[i] * code[i]; });
      const float wcc = lane_sum<n>([&](int i) { return weight[i] * code[i] * code[i]; });
      const float wxc = lane_sum<n>([&](int i) { return weight[i] * x[i] * code[i]; });
      const float determinant = w * wcc - wc * wc;
      if (!(determinant > 1e-12f * w * wcc)) break;
      s = (w * wxc - wx * wc) / determinant;
      o = (wcc * wx - wc * wxc) / determinant;
      if (offset_below_zero && o > 0) {
        o = 0;
        s = wxc / wcc;
      }
      if (!(s > 0)) break;
      const float error = lane_sum<n>([&](int i) {
        const float difference = s * code[i] + o - x[i];
        return weight[i] * difference * difference;
      });
      if (error >= best_error) break;
      best_error = error;
      *scale = s;
      *offset = o;
    }
  }
}

// 256 weights in groups of kGroup: w = d * sc * code, sc a small integer of each group.
template <int kGroup>
struct ScaledGroups {
  static constexpr int kGroups = 256 / kGroup;
  float d;             // as the f16 field holds it
  int scale[kGroups];  // sc
  float code[256];
};

template <int kGroup, class Codes>
void quantize_scaled_groups(const float* source, const float* importance, const Codes& codes,
                            int scale_low, int scale_high, ScaledGroups<kGroup>* out) {
  constexpr int kGroups = 256 / kGroup;
  *out = {};
  const Scaled<256> v(source, importance);
  if (v.zero) return;
  float fitted[kGroups];
  float largest = 0;
  for (int g = 0; g < kGroups; ++g) {
    fitted[g] = fit_scale<kGroup>(v.x + g * kGroup, v.weight + g * kGroup, codes);
    if (std::fabs(fitted[g]) > std::fabs(largest)) largest = fitted[g];
  }
  // The largest scale takes the end of the range that reaches further.
  float d = v.rounded(largest / static_cast<float>(scale_low));
  float best_error = INFINITY;
  for (int pass = 0; pass < 3; ++pass) {
    ScaledGroups<kGroup> trial;
    trial.d = v.in_source_units(d);
    float error = 0, xc = 0, cc = 0;
    for (int g = 0; g < kGroups; ++g) {
      const float* x = v.x + g * kGroup;
      const float* weight = v.weight + g * kGroup;
      const float ideal = pass == 0 ? fitted[g] * inverse(d) : static_cast<float>(out->scale[g]);
      const int middle = static_cast<int>(nearest(clamp(ideal, -1000.0f, 1000.0f)));
      float group_error = INFINITY;
      for (int sc = middle - 1; sc <= middle + 1; ++sc) {
        const int clipped = std::min(std::max(sc, scale_low), scale_high);
        const float s = d * static_cast<float>(clipped);
        const float inv = inverse(s);
        float code[kGroup];
        for (int i = 0; i < kGroup; ++i) code[i] = codes(x[i] * inv);
        const float e = lane_sum<kGroup>([&](int i) {
          const float difference = s * code[i] - x[i];
          return weight[i] * difference * difference;
        });
        if (e < group_error) {
          group_error = e;
          trial.scale[g] = clipped;
          std::copy(code, code + kGroup, trial.code + g * kGroup);
        }
      }
      error += group_error;
      const float sc = static_cast<float>(trial.scale[g]);
      const float* code = trial.code + g * kGroup;
      xc += sc * lane_sum<kGroup>([&](int i) { return weight[i] * x[i] * code[i]; });
      cc += sc * sc * lane_sum<kGroup>([&](int i) { return weight[i] * code[i] * code[i]; });
    }
    if (error < best_error) {
      best_error = error;
      *out = trial;
    }
    if (!(cc > 0)) return;
    d = v.rounded(xc / cc);
  }
}

// 256 weights in groups of kGroup: w = d * sc * code - dmin * mn, sc and mn of each group 0..63
// (or 0..15), code 0..top.
template <int kGroup>
struct AffineGroups {
  static constexpr int kGroups = 256 / kGroup;
  float d, dmin;  // as the f16 fields hold them
  uint8_t scale[kGroups], min[kGroups];
  uint8_t code[256];
};

template <int kGroup>
void quantize_affine_groups(const float* source, const float* importance, int top, int scale_top,
                            AffineGroups<kGroup>* out) {
  constexpr int kGroups = 256 / kGroup;
  *out = {};
  const Scaled<256> v(source, importance);
  if (v.zero) return;
  const float limit = static_cast<float>(top);
  float scale[kGroups], min[kGroups];
  float largest_scale = 0, largest_min = 0;
  for (int g = 0; g < kGroups; ++g) {
    float offset;
    fit_affine<kGroup>(v.x + g * kGroup, v.weight + g * kGroup, top, true, &scale[g], &offset);
    min[g] = -offset;
    largest_scale = std::max(largest_scale, scale[g]);
    largest_min = std::max(largest_min, min[g]);
  }
  float d = v.rounded(largest_scale / static_cast<float>(scale_top));
  float dmin = v.rounded(largest_min / static_cast<float>(scale_top));
  float best_error = INFINITY;
  for (int pass = 0; pass < 3; ++pass) {
    AffineGroups<kGroup> trial;
    trial.d = v.in_source_units(d);
    trial.dmin = v.in_source_units(dmin);
    const auto clip = [&](float ideal, int shift) {
      const float in_range = clamp(ideal, 0.0f, static_cast<float>(scale_top));
      return std::min(std::max(static_cast<int>(nearest(in_range)) + shift, 0), scale_top);
    };
    float error = 0;
    // These sums are the normal equations of the block, x ~ d * (sc * code) - dmin * mn.
    float aa = 0, ab = 0, bb = 0, ax = 0, bx = 0;
    for (int g = 0; g < kGroups; ++g) {
      const float* x = v.x + g * kGroup;
      const float* weight = v.weight + g * kGroup;
      const float ideal_scale =
          pass == 0 ? scale[g] * inverse(d) : static_cast<float>(out->scale[g]);
      const float ideal_min = pass == 0 ? min[g] * inverse(dmin) : static_cast<float>(out->min[g]);
      float group_error = INFINITY;
      for (int shift = 0; shift < 9; ++shift) {
        const int sc = clip(ideal_scale, shift % 3 - 1);
        const int mn = clip(ideal_min, shift / 3 - 1);
        const float s = d * static_cast<float>(sc);
        const float m = dmin * static_cast<float>(mn);
        const float inv = inverse(s);
        float code[kGroup];
        for (int i = 0; i < kGroup; ++i) {
          code[i] = nearest(clamp((x[i] + m) * inv, 0.0f, limit));
        }
        const float e = lane_sum<kGroup>([&](int i) {
          const float difference = s * code[i] - m - x[i];
          return weight[i] * difference * difference;
        });
        if (e < group_error) {
          group_error = e;
          trial.scale[g] = static_cast<uint8_t>(sc);
          trial.min[g] = static_cast<uint8_t>(mn);
          for (int i = 0; i < kGroup; ++i) {
            trial.code[g * kGroup + i] = static_cast<uint8_t>(code[i]);
          }
        }
      }
      error += group_error;
      const float sc = trial.scale[g], mn = trial.min[g];
      float code[kGroup];
      for (int i = 0; i < kGroup; ++i) code[i] = trial.code[g * kGroup + i];
      aa += sc * sc * lane_sum<kGroup>([&](int i) { return weight[i] * code[i] * code[i]; });
      ab += sc * mn * lane_sum<kGroup>([&](int i) { return weight[i] * code[i]; });
      bb += mn * mn * lane_sum<kGroup>([&](int i) { return weight[i]; });
      ax += sc * lane_sum<kGroup>([&](int i) { return weight[i] * x[i] * code[i]; });
      bx += mn * lane_sum<kGroup>([&](int i) { return weight[i] * x[i]; });
    }
    if (error < best_error) {
      best_error = error;
      *out = trial;
    }
    const float determinant = aa * bb - ab * ab;
    if (determinant > 1e-6f * aa * bb) {
      d = v.rounded((ax * bb - bx * ab) / determinant);
      dmin = v.rounded((ax * ab - bx * aa) / determinant);
    } else if (aa > 0) {
      d = v.rounded((ax + dmin * ab) / aa);
    }
    if (!(d >= 0 && dmin >= 0)) return;
  }
}

// ---- blocks of 32 with one scale ----

// Returns the value of largest magnitude, the first where several are equal.
inline float extreme32(const float* x) {
  float extreme = 0;
  for (int i = 0; i < 32; ++i) {
    if (std::fabs(x[i]) > std::fabs(extreme)) extreme = x[i];
  }
  return extreme;
}

// Quantizes to w = d * (code - top), codes 0..2 top - 1. Without importances the weight of largest
// magnitude takes code 0, as in the published reference quantizer. Returns d as stored.
inline float quantize_scale32(const float* x, const float* importance, int top, uint8_t* code) {
  const float half = static_cast<float>(top);
  if (importance == nullptr) {
    const float d = extreme32(x) / -half;
    const float inv = std::fabs(d) < 1e-37f ? 0.0f : 1 / d;
    for (int i = 0; i < 32; ++i) {
      code[i] = static_cast<uint8_t>(clamp(x[i] * inv + (half + 0.5f), 0.0f, 2 * half - 1));
    }
    return round_to_f16(d);
  }
  const LinearCodes codes{-half, half - 1, 0.1f / half};
  const Scaled<32> v(x, importance);
  const float d = v.zero ? 0.0f : v.rounded(fit_scale<32>(v.x, v.weight, codes));
  const float inv = inverse(d);
  for (int i = 0; i < 32; ++i) code[i] = static_cast<uint8_t>(codes(v.x[i] * inv) + half);
  return v.in_source_units(d);
}

// Quantizes to w = d * code + m, codes 0..top. Without importances the grid spans the smallest to
// the largest weight, as in the published reference quantizer.
inline void quantize_affine32(const float* x, const float* importance, int top, float* d, float* m,
                              uint8_t* code) {
  const float limit = static_cast<float>(top);
  if (importance == nullptr) {
    const auto [low, high] = std::minmax_element(x, x + 32);
    // A range beyond the largest float has a step beyond the largest f16 anyway.
    const float step = std::isfinite(*high - *low) ? (*high - *low) / limit : 1e38f;
    const float inv = step < 1e-37f ? 0.0f : 1 / step;
    for (int i = 0; i < 32; ++i) {
      code[i] = static_cast<uint8_t>(clamp((x[i] - *low) * inv + 0.5f, 0.0f, limit));
    }
    *d = round_to_f16(step);
    *m = round_to_f16(*low);
    return;
  }
  const Scaled<32> v(x, importance);
  float scale = 0, offset = 0;
  if (!v.zero) fit_affine<32>(v.x, v.weight, top, false, &scale, &offset);
  scale = v.rounded(scale);
  offset = v.rounded(offset);
  const float inv = inverse(scale);
  for (int i = 0; i < 32; ++i) {
    code[i] = static_cast<uint8_t>(nearest(clamp((v.x[i] - offset) * inv, 0.0f, limit)));
  }
  *d = v.in_source_units(scale);
  *m = v.in_source_units(offset);
}

}  // namespace stoker
