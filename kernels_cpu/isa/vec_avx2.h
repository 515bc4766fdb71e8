// Avx2Vec is the vector of vec_scalar.h in two AVX2 registers.
#pragma once

#include <cstdint>

#include "kernels_cpu/target.h"

#if STOKER_X86
STOKER_BEGIN_AVX2
namespace stoker {

struct Avx2Vec {
  __m256 a, b;  // lanes 0-7, 8-15

  static STOKER_INLINE Avx2Vec set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static STOKER_INLINE Avx2Vec load(const float* p) {
    return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
  }
  // Returns all ones in the lanes below n.
  static STOKER_INLINE __m256i first(int64_t n) {
    int m = n < 0 ? 0 : n > 8 ? 8 : static_cast<int>(n);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(m), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static STOKER_INLINE Avx2Vec loadn(const float* p, int64_t n) {
    return {_mm256_maskload_ps(p, first(n)), _mm256_maskload_ps(p + 8, first(n - 8))};
  }
  static STOKER_INLINE Avx2Vec load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
  }
  static STOKER_INLINE __m256 bf16(const uint16_t* p) {
    __m256i w = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
  }
  static STOKER_INLINE Avx2Vec load_bf16(const uint16_t* p) { return {bf16(p), bf16(p + 8)}; }
  STOKER_INLINE void store(float* p) const {
    _mm256_storeu_ps(p, a);
    _mm256_storeu_ps(p + 8, b);
  }
  STOKER_INLINE void storen(float* p, int64_t n) const {
    _mm256_maskstore_ps(p, first(n), a);
    _mm256_maskstore_ps(p + 8, first(n - 8), b);
  }
  STOKER_INLINE void store_f16(uint16_t* p) const {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, kNearest));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(b, kNearest));
  }
  friend STOKER_INLINE Avx2Vec operator+(Avx2Vec x, Avx2Vec y) {
    return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
  }
  friend STOKER_INLINE Avx2Vec operator-(Avx2Vec x, Avx2Vec y) {
    return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)};
  }
  friend STOKER_INLINE Avx2Vec operator*(Avx2Vec x, Avx2Vec y) {
    return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
  }
  friend STOKER_INLINE Avx2Vec operator/(Avx2Vec x, Avx2Vec y) {
    return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)};
  }
  static STOKER_INLINE Avx2Vec fma(Avx2Vec x, Avx2Vec y, Avx2Vec z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
  }
  static STOKER_INLINE Avx2Vec select_lt(Avx2Vec l, Avx2Vec r, Avx2Vec x, Avx2Vec y) {
    return {_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(l.a, r.a, _CMP_LT_OQ)),
            _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(l.b, r.b, _CMP_LT_OQ))};
  }
  static STOKER_INLINE Avx2Vec min(Avx2Vec x, Avx2Vec y) {
    return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)};
  }
  static STOKER_INLINE Avx2Vec max(Avx2Vec x, Avx2Vec y) {
    return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)};
  }
  static STOKER_INLINE __m256 scale_exponent8(__m256 p, __m256 magic) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p),
                                                _mm256_slli_epi32(_mm256_castps_si256(magic), 23)));
  }
  static STOKER_INLINE Avx2Vec scale_exponent(Avx2Vec p, Avx2Vec magic) {
    return {scale_exponent8(p.a, magic.a), scale_exponent8(p.b, magic.b)};
  }
  STOKER_INLINE float reduce_add() const {
    __m256 h = _mm256_add_ps(a, b);
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
  }
  STOKER_INLINE float reduce_max() const {
    __m256 h = _mm256_max_ps(a, b);
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
  }
};

}  // namespace stoker
STOKER_END_TARGET
#endif
