// Bit packings that several formats share: the nibbles of 32-weight blocks, and the 6-bit scales
// and minima of Q4_K and Q5_K.
#pragma once

#include <cstdint>

namespace stoker {

// The table that IQ4_NL and IQ4_XS index.
inline constexpr int8_t kIq4Codes[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                         1,    13,   25,  38,  53,  69,  89,  113};

// A call returns the value of the table nearest to v; iq4_index returns the index of a value.
struct Iq4Codes {
  float low = -127, high = 113;
  float step = 0.008f;  // of the search's candidate grids (search.h)
  float operator()(float v) const {
    float code = kIq4Codes[0];
    for (int i = 1; i < 16; ++i) {
      const float middle = 0.5f * static_cast<float>(kIq4Codes[i - 1] + kIq4Codes[i]);
      code = v > middle ? static_cast<float>(kIq4Codes[i]) : code;
    }
    return code;
  }
};
inline uint8_t iq4_index(float code) {
  uint8_t index = 0;
  while (static_cast<float>(kIq4Codes[index]) < code) ++index;
  return index;
}

// qs[j] holds weight j in its low and weight j + 16 in its high nibble (j < 16).
inline void unpack_nibbles32(const uint8_t* qs, int8_t* q, int offset) {
  for (int j = 0; j < 16; ++j) {
    q[j] = static_cast<int8_t>((qs[j] & 15) - offset);
    q[j + 16] = static_cast<int8_t>((qs[j] >> 4) - offset);
  }
}
inline void unpack_nibbles32(const uint8_t* qs, int8_t* q, const int8_t (&table)[16]) {
  for (int j = 0; j < 16; ++j) {
    q[j] = table[qs[j] & 15];
    q[j + 16] = table[qs[j] >> 4];
  }
}

inline void pack_nibbles32(const uint8_t* v, uint8_t* qs) {
  for (int j = 0; j < 16; ++j) qs[j] = static_cast<uint8_t>(v[j] | v[j + 16] << 4);
}

// The 5-bit blocks add bit j of the little-endian word qh as bit 4 of weight j (j < 32).
inline void unpack_five_bits32(const uint8_t* qs, uint32_t qh, int8_t* q, int offset) {
  for (int j = 0; j < 16; ++j) {
    q[j] = static_cast<int8_t>(((qs[j] & 15) | (qh >> j & 1) << 4) - offset);
    q[j + 16] = static_cast<int8_t>((qs[j] >> 4 | (qh >> (j + 16) & 1) << 4) - offset);
  }
}

inline uint32_t pack_five_bits32(const uint8_t* v, uint8_t* qs) {
  uint32_t qh = 0;
  for (int j = 0; j < 16; ++j) {
    qs[j] = static_cast<uint8_t>((v[j] & 15) | (v[j + 16] & 15) << 4);
  }
  for (int j = 0; j < 32; ++j) qh |= uint32_t{v[j]} >> 4 << j;
  return qh;
}

// Eight 6-bit scales and 6-bit minima lie in 12 bytes. Bytes 0..3 and 4..7 hold scales 0..3 and
// minima 0..3 in their low 6 bits; byte 8 + i holds the low nibbles of scale 4 + i (low) and
// minimum 4 + i (high), whose upper two bits are the upper two of bytes i and 4 + i.
inline void unpack_scale_min6(const uint8_t* p, int g, int* scale, int* min) {
  if (g < 4) {
    *scale = p[g] & 63;
    *min = p[g + 4] & 63;
  } else {
    *scale = (p[g + 4] & 15) | (p[g - 4] >> 6) << 4;
    *min = p[g + 4] >> 4 | (p[g] >> 6) << 4;
  }
}

inline void pack_scale_min6(const uint8_t* scale, const uint8_t* min, uint8_t* p) {
  for (int i = 0; i < 4; ++i) {
    p[i] = static_cast<uint8_t>(scale[i] | (scale[i + 4] >> 4) << 6);
    p[i + 4] = static_cast<uint8_t>(min[i] | (min[i + 4] >> 4) << 6);
    p[i + 8] = static_cast<uint8_t>((scale[i + 4] & 15) | (min[i + 4] & 15) << 4);
  }
}

}  // namespace stoker
