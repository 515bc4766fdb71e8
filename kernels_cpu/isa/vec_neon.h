// NeonVec is the vector of vec_scalar.h in four NEON registers.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels_cpu/target.h"

#if STOKER_ARM64
STOKER_BEGIN_NEON
namespace stoker {

struct NeonVec {
  float32x4_t v[4];  // lanes 0-3, 4-7, 8-11, 12-15

  template <class F>
  static STOKER_INLINE NeonVec map(F f) {
    return {{f(0), f(1), f(2), f(3)}};
  }
  static STOKER_INLINE NeonVec set1(float x) {
    float32x4_t q = vdupq_n_f32(x);
    return {{q, q, q, q}};
  }
  static STOKER_INLINE NeonVec load(const float* p) {
    return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}};
  }
  static STOKER_INLINE NeonVec loadn(const float* p, int64_t n) {
    if (n >= 16) return load(p);
    float buffer[16] = {};
    for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
    return load(buffer);
  }
  static STOKER_INLINE float32x4_t half4(const uint16_t* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
  }
  static STOKER_INLINE NeonVec load_f16(const uint16_t* p) {
    return {{half4(p), half4(p + 4), half4(p + 8), half4(p + 12)}};
  }
  static STOKER_INLINE float32x4_t brain4(const uint16_t* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
  }
  static STOKER_INLINE NeonVec load_bf16(const uint16_t* p) {
    return {{brain4(p), brain4(p + 4), brain4(p + 8), brain4(p + 12)}};
  }
  STOKER_INLINE void store(float* p) const {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, v[i]);
  }
  STOKER_INLINE void storen(float* p, int64_t n) const {
    if (n >= 16) return store(p);
    float buffer[16];
    store(buffer);
    for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
  }
  STOKER_INLINE void store_f16(uint16_t* p) const {
    for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(v[i])));
  }
  friend STOKER_INLINE NeonVec operator+(NeonVec a, NeonVec b) {
    return map([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
  }
  friend STOKER_INLINE NeonVec operator-(NeonVec a, NeonVec b) {
    return map([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
  }
  friend STOKER_INLINE NeonVec operator*(NeonVec a, NeonVec b) {
    return map([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
  }
  friend STOKER_INLINE NeonVec operator/(NeonVec a, NeonVec b) {
    return map([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
  }
  static STOKER_INLINE NeonVec fma(NeonVec a, NeonVec b, NeonVec c) {
    return map([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
  }
  static STOKER_INLINE NeonVec select_lt(NeonVec l, NeonVec r, NeonVec x, NeonVec y) {
    return map([&](int i) { return vbslq_f32(vcltq_f32(l.v[i], r.v[i]), x.v[i], y.v[i]); });
  }
  static STOKER_INLINE NeonVec min(NeonVec a, NeonVec b) { return select_lt(a, b, a, b); }
  static STOKER_INLINE NeonVec max(NeonVec a, NeonVec b) { return select_lt(b, a, a, b); }
  static STOKER_INLINE NeonVec scale_exponent(NeonVec p, NeonVec magic) {
    return map([&](int i) {
      return vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(p.v[i]),
                                             vshlq_n_u32(vreinterpretq_u32_f32(magic.v[i]), 23)));
    });
  }
  STOKER_INLINE float reduce_add() const {
    float32x4_t q = vaddq_f32(vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3]));
    float32x2_t d = vadd_f32(vget_low_f32(q), vget_high_f32(q));
    return vget_lane_f32(d, 0) + vget_lane_f32(d, 1);
  }
  STOKER_INLINE float reduce_max() const {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(v[0], v[1]), vmaxq_f32(v[2], v[3])));
  }
};

}  // namespace stoker
STOKER_END_TARGET
#endif
