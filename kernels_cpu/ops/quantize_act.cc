// Quantizes activations to int8, with one float scale per 32 values and the sums of 16. The scale
// is found from the bit patterns (magnitudes of floats order like integers), which makes the
// maximum exact on every ISA and reveals an infinity or a NaN: such a group gets q = 0 and
// scale = NaN, so that the outputs it touches are NaN and not plausible numbers.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels_cpu/kernel.h"
#include "kernels_cpu/target.h"

namespace stoker {
namespace {

constexpr int32_t kMagnitude = 0x7fffffff;
constexpr int32_t kInfinityBits = 0x7f800000;
// A group below this magnitude (2^-116) counts as zero: 127 / max overflows from 2^-121 down.
constexpr int32_t kTinyBits = (127 - 116) << 23;
constexpr int32_t kNanBits = 0x7fc00000;

float bits_to_float(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Sets the scale of a group whose largest magnitude has these bits, and the factor that maps the
// group to -127..127. Returns false where the group's q are all zero.
bool group_scale(int32_t max_bits, float* scale, float* factor) {
  if (max_bits >= kInfinityBits || max_bits < kTinyBits) {
    *scale = max_bits >= kInfinityBits ? bits_to_float(kNanBits) : 0.0f;
    *factor = 0.0f;
    return false;
  }
  const float max = bits_to_float(max_bits);
  *scale = max / 127.0f;
  *factor = 127.0f / max;
  return true;
}

void pad(int64_t cols, int8_t* q) {
  if (cols % 64 != 0) std::memset(q + cols, 0, static_cast<size_t>(64 - cols % 64));
}

void quantize_scalar(const float* x, int64_t cols, int8_t* q, float* scale, int32_t* sum16) {
  for (int64_t k = 0; k < cols; k += 32) {
    int32_t max_bits = 0;
    for (int i = 0; i < 32; ++i) {
      int32_t bits;
      std::memcpy(&bits, x + k + i, sizeof(bits));
      bits &= kMagnitude;
      max_bits = bits > max_bits ? bits : max_bits;
    }
    float factor;
    const bool some = group_scale(max_bits, scale + k / 32, &factor);
    for (int half = 0; half < 2; ++half) {
      int32_t sum = 0;
      for (int i = 16 * half; i < 16 * half + 16; ++i) {
        const int32_t v = some ? static_cast<int32_t>(std::lrintf(x[k + i] * factor)) : 0;
        q[k + i] = static_cast<int8_t>(v);
        sum += v;
      }
      sum16[k / 16 + half] = sum;
    }
  }
  pad(cols, q);
}

#if defined(STOKER_X86)
STOKER_BEGIN_AVX2
void quantize_avx2(const float* x, int64_t cols, int8_t* q, float* scale, int32_t* sum16) {
  const __m256i magnitude = _mm256_set1_epi32(kMagnitude);
  const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t k = 0; k < cols; k += 32) {
    __m256 v[4];
    __m256i m[4];
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm256_loadu_ps(x + k + 8 * i);
      m[i] = _mm256_and_si256(_mm256_castps_si256(v[i]), magnitude);
    }
    const __m256i m8 = _mm256_max_epi32(_mm256_max_epi32(m[0], m[1]), _mm256_max_epi32(m[2], m[3]));
    __m128i m4 = _mm_max_epi32(_mm256_castsi256_si128(m8), _mm256_extracti128_si256(m8, 1));
    m4 = _mm_max_epi32(m4, _mm_shuffle_epi32(m4, 0x4e));
    m4 = _mm_max_epi32(m4, _mm_shuffle_epi32(m4, 0xb1));
    float factor;
    __m256i* out = reinterpret_cast<__m256i*>(q + k);
    if (!group_scale(_mm_cvtsi128_si32(m4), scale + k / 32, &factor)) {
      _mm256_storeu_si256(out, _mm256_setzero_si256());
      sum16[k / 16] = 0;
      sum16[k / 16 + 1] = 0;
      continue;
    }
    const __m256 f = _mm256_set1_ps(factor);
    __m256i n[4];
    for (int i = 0; i < 4; ++i) n[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], f));
    const __m256i s0 = _mm256_add_epi32(n[0], n[1]), s1 = _mm256_add_epi32(n[2], n[3]);
    // Both sums have 8 lanes: their halves are added first, then the lanes pairwise.
    __m128i a = _mm_add_epi32(_mm256_castsi256_si128(s0), _mm256_extracti128_si256(s0, 1));
    __m128i b = _mm_add_epi32(_mm256_castsi256_si128(s1), _mm256_extracti128_si256(s1, 1));
    a = _mm_hadd_epi32(a, b);
    a = _mm_hadd_epi32(a, a);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(sum16 + k / 16), a);
    const __m256i p =
        _mm256_packs_epi16(_mm256_packs_epi32(n[0], n[1]), _mm256_packs_epi32(n[2], n[3]));
    _mm256_storeu_si256(out, _mm256_permutevar8x32_epi32(p, in_order));
  }
  pad(cols, q);
}
STOKER_END_TARGET

STOKER_BEGIN_AVX512
void quantize_avx512(const float* x, int64_t cols, int8_t* q, float* scale, int32_t* sum16) {
  const __m512i magnitude = _mm512_set1_epi32(kMagnitude);
  for (int64_t k = 0; k < cols; k += 32) {
    const __m512 v0 = _mm512_loadu_ps(x + k), v1 = _mm512_loadu_ps(x + k + 16);
    const __m512i m = _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(v0), magnitude),
                                       _mm512_and_si512(_mm512_castps_si512(v1), magnitude));
    float factor;
    __m128i* out = reinterpret_cast<__m128i*>(q + k);
    if (!group_scale(_mm512_reduce_max_epi32(m), scale + k / 32, &factor)) {
      _mm_storeu_si128(out, _mm_setzero_si128());
      _mm_storeu_si128(out + 1, _mm_setzero_si128());
      sum16[k / 16] = 0;
      sum16[k / 16 + 1] = 0;
      continue;
    }
    const __m512 f = _mm512_set1_ps(factor);
    const __m512i n0 = _mm512_cvtps_epi32(_mm512_mul_ps(v0, f));
    const __m512i n1 = _mm512_cvtps_epi32(_mm512_mul_ps(v1, f));
    _mm_storeu_si128(out, _mm512_cvtepi32_epi8(n0));
    _mm_storeu_si128(out + 1, _mm512_cvtepi32_epi8(n1));
    sum16[k / 16] = _mm512_reduce_add_epi32(n0);
    sum16[k / 16 + 1] = _mm512_reduce_add_epi32(n1);
  }
  pad(cols, q);
}
STOKER_END_TARGET
#endif

#if defined(STOKER_ARM64)
void quantize_neon(const float* x, int64_t cols, int8_t* q, float* scale, int32_t* sum16) {
  const int32x4_t magnitude = vdupq_n_s32(kMagnitude);
  for (int64_t k = 0; k < cols; k += 32) {
    float32x4_t v[8];
    int32x4_t m = vdupq_n_s32(0);
    for (int i = 0; i < 8; ++i) {
      v[i] = vld1q_f32(x + k + 4 * i);
      m = vmaxq_s32(m, vandq_s32(vreinterpretq_s32_f32(v[i]), magnitude));
    }
    float factor;
    if (!group_scale(vmaxvq_s32(m), scale + k / 32, &factor)) {
      std::memset(q + k, 0, 32);
      sum16[k / 16] = 0;
      sum16[k / 16 + 1] = 0;
      continue;
    }
    for (int half = 0; half < 2; ++half) {
      int32x4_t n[4];
      for (int i = 0; i < 4; ++i) n[i] = vcvtnq_s32_f32(vmulq_n_f32(v[4 * half + i], factor));
      const int16x8_t lo = vcombine_s16(vmovn_s32(n[0]), vmovn_s32(n[1]));
      const int16x8_t hi = vcombine_s16(vmovn_s32(n[2]), vmovn_s32(n[3]));
      vst1q_s8(q + k + 16 * half, vcombine_s8(vmovn_s16(lo), vmovn_s16(hi)));
      sum16[k / 16 + half] = vaddvq_s32(vaddq_s32(vaddq_s32(n[0], n[1]), vaddq_s32(n[2], n[3])));
    }
  }
  pad(cols, q);
}
#endif

}  // namespace

QuantizeActFn quantize_act_kernel(Isa isa) {
  switch (isa) {
#if defined(STOKER_X86)
    case Isa::avx2:
    case Isa::avxvnni:
      return quantize_avx2;
    case Isa::avx512:
      return quantize_avx512;
#endif
#if defined(STOKER_ARM64)
    case Isa::neon:
    case Isa::i8mm:
      return quantize_neon;
#endif
    default:
      return quantize_scalar;
  }
}

}  // namespace stoker
