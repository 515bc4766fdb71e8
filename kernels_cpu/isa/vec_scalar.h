// ScalarVec holds 16 floats in plain C++; it is the reference of the vector type that ops and the
// float formats are written in. Avx2Vec, Avx512Vec and NeonVec (vec_*.h) have the same members and
// give the same bits: every member is one IEEE operation a lane, and sums over lanes use one tree.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels_cpu/fp16.h"

namespace stoker {

struct ScalarVec {
  float v[16];

  template <class F>
  static ScalarVec map(F f) {
    ScalarVec r;
    for (int i = 0; i < 16; ++i) r.v[i] = f(i);
    return r;
  }
  static ScalarVec set1(float x) {
    return map([&](int) { return x; });
  }
  static ScalarVec load(const float* p) {
    return map([&](int i) { return p[i]; });
  }
  // Loads the first n lanes; the others are 0.
  static ScalarVec loadn(const float* p, int64_t n) {
    return map([&](int i) { return i < n ? p[i] : 0.0f; });
  }
  static ScalarVec load_f16(const uint16_t* p) {
    return map([&](int i) { return f16_to_f32(p[i]); });
  }
  static ScalarVec load_bf16(const uint16_t* p) {
    return map([&](int i) { return bf16_to_f32(p[i]); });
  }
  void store(float* p) const { std::memcpy(p, v, sizeof v); }
  void storen(float* p, int64_t n) const {
    std::memcpy(p, v, static_cast<size_t>(n < 16 ? n : 16) * sizeof(float));
  }
  void store_f16(uint16_t* p) const {
    for (int i = 0; i < 16; ++i) p[i] = f32_to_f16(v[i]);
  }
  friend ScalarVec operator+(ScalarVec a, ScalarVec b) {
    return map([&](int i) { return a.v[i] + b.v[i]; });
  }
  friend ScalarVec operator-(ScalarVec a, ScalarVec b) {
    return map([&](int i) { return a.v[i] - b.v[i]; });
  }
  friend ScalarVec operator*(ScalarVec a, ScalarVec b) {
    return map([&](int i) { return a.v[i] * b.v[i]; });
  }
  friend ScalarVec operator/(ScalarVec a, ScalarVec b) {
    return map([&](int i) { return a.v[i] / b.v[i]; });
  }
  // Returns a * b + c, rounded once.
  static ScalarVec fma(ScalarVec a, ScalarVec b, ScalarVec c) {
    return map([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
  }
  // Returns a < b ? x : y. min and max are x86's: the second operand where unordered.
  static ScalarVec select_lt(ScalarVec a, ScalarVec b, ScalarVec x, ScalarVec y) {
    return map([&](int i) { return a.v[i] < b.v[i] ? x.v[i] : y.v[i]; });
  }
  static ScalarVec min(ScalarVec a, ScalarVec b) { return select_lt(a, b, a, b); }
  static ScalarVec max(ScalarVec a, ScalarVec b) { return select_lt(b, a, a, b); }
  // Adds the low bits of `magic` (a float 1.5 * 2^23 + n) to the exponent of p: p * 2^n.
  static ScalarVec scale_exponent(ScalarVec p, ScalarVec magic) {
    return map([&](int i) {
      uint32_t bits, n;
      std::memcpy(&bits, &p.v[i], 4);
      std::memcpy(&n, &magic.v[i], 4);
      bits += n << 23;
      float r;
      std::memcpy(&r, &bits, 4);
      return r;
    });
  }
  // Sums the lanes as l[i] += l[i + 8], then + 4, + 2, + 1.
  float reduce_add() const {
    float l[16];
    std::memcpy(l, v, sizeof l);
    for (int step = 8; step > 0; step /= 2) {
      for (int i = 0; i < step; ++i) l[i] += l[i + step];
    }
    return l[0];
  }
  float reduce_max() const {
    float m = v[0];
    for (float x : v) m = x > m ? x : m;
    return m;
  }
};

}  // namespace stoker
