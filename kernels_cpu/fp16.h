// Scalar conversions between f32 and the two 16-bit floats, rounding to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

namespace stoker {

inline uint32_t f32_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float f32_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Converts IEEE binary16 to f32, exactly. NaNs become quiet, as in the hardware conversions.
inline float f16_to_f32(uint16_t h) {
  const uint32_t sign = uint32_t{h & 0x8000u} << 16;
  const uint32_t exponent = (h >> 10) & 31;
  const uint32_t mantissa = h & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    return f32_from_bits(sign | f32_bits(static_cast<float>(mantissa) * 0x1p-24f));
  }
  if (exponent == 31) {
    return f32_from_bits(sign | 0x7f800000u | (mantissa ? 0x400000u | mantissa << 13 : 0));
  }
  return f32_from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
}

// Converts f32 to IEEE binary16, to nearest, ties to even; values from 65504 plus half a step on
// become infinity.
inline uint16_t f32_to_f16(float x) {
  const uint32_t bits = f32_bits(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x7f800000u) {  // infinity or NaN
    const uint32_t nan = magnitude > 0x7f800000u ? 0x200u | (magnitude >> 13 & 0x3ffu) : 0;
    return static_cast<uint16_t>(sign | 0x7c00u | nan);
  }
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Below 2^-14 the step is 2^-24: the sum 0.5 + |x| has exactly that step in f32, so that the
    // addition itself rounds and leaves the mantissa in the low bits.
    const float sum = f32_from_bits(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (f32_bits(sum) - f32_bits(0.5f)));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
}

// Converts bfloat16 to f32, exactly.
inline float bf16_to_f32(uint16_t h) { return f32_from_bits(uint32_t{h} << 16); }

// Converts f32 to bfloat16, to nearest, ties to even; NaNs stay NaN (made quiet).
inline uint16_t f32_to_bf16(float x) {
  const uint32_t bits = f32_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 64);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// These reads and writes are little-endian and may be unaligned, since blocks lie at any address.
inline uint16_t load_u16(const uint8_t* p) {
  uint16_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline uint32_t load_u32(const uint8_t* p) {
  uint32_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline float load_f16(const uint8_t* p) { return f16_to_f32(load_u16(p)); }
inline void store_u16(uint8_t* p, uint16_t v) { std::memcpy(p, &v, sizeof v); }
inline void store_u32(uint8_t* p, uint32_t v) { std::memcpy(p, &v, sizeof v); }
inline void store_f16(uint8_t* p, float x) { store_u16(p, f32_to_f16(x)); }

}  // namespace stoker
