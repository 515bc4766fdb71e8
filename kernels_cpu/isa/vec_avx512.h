// Avx512Vec is the vector of vec_scalar.h in one AVX-512 register.
#pragma once

#include <cstdint>

#include "kernels_cpu/target.h"

#if STOKER_X86
STOKER_BEGIN_AVX512
namespace stoker {

struct Avx512Vec {
  __m512 v;

  static STOKER_INLINE Avx512Vec set1(float x) { return {_mm512_set1_ps(x)}; }
  static STOKER_INLINE Avx512Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static STOKER_INLINE __mmask16 first(int64_t n) {
    return n >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << n) - 1);
  }
  static STOKER_INLINE Avx512Vec loadn(const float* p, int64_t n) {
    return {_mm512_maskz_loadu_ps(first(n), p)};
  }
  static STOKER_INLINE Avx512Vec load_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static STOKER_INLINE Avx512Vec load_bf16(const uint16_t* p) {
    __m512i w = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(w, 16))};
  }
  STOKER_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  STOKER_INLINE void storen(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  STOKER_INLINE void store_f16(uint16_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  friend STOKER_INLINE Avx512Vec operator+(Avx512Vec a, Avx512Vec b) {
    return {_mm512_add_ps(a.v, b.v)};
  }
  friend STOKER_INLINE Avx512Vec operator-(Avx512Vec a, Avx512Vec b) {
    return {_mm512_sub_ps(a.v, b.v)};
  }
  friend STOKER_INLINE Avx512Vec operator*(Avx512Vec a, Avx512Vec b) {
    return {_mm512_mul_ps(a.v, b.v)};
  }
  friend STOKER_INLINE Avx512Vec operator/(Avx512Vec a, Avx512Vec b) {
    return {_mm512_div_ps(a.v, b.v)};
  }
  static STOKER_INLINE Avx512Vec fma(Avx512Vec a, Avx512Vec b, Avx512Vec c) {
    return {_mm512_fmadd_ps(a.v, b.v, c.v)};
  }
  static STOKER_INLINE Avx512Vec select_lt(Avx512Vec a, Avx512Vec b, Avx512Vec x, Avx512Vec y) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
  }
  static STOKER_INLINE Avx512Vec min(Avx512Vec a, Avx512Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
  static STOKER_INLINE Avx512Vec max(Avx512Vec a, Avx512Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  static STOKER_INLINE Avx512Vec scale_exponent(Avx512Vec p, Avx512Vec magic) {
    return {_mm512_castsi512_ps(_mm512_add_epi32(
        _mm512_castps_si512(p.v), _mm512_slli_epi32(_mm512_castps_si512(magic.v), 23)))};
  }
  STOKER_INLINE float reduce_add() const {
    __m256 h = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
  }
  STOKER_INLINE float reduce_max() const { return _mm512_reduce_max_ps(v); }
};

}  // namespace stoker
STOKER_END_TARGET
#endif
