// NEON with dotprod, and with i8mm: the vector operations of tile_avx512.h for tiles of 4 rows, so
// that the formats' unpackers and tile_matmul.h serve this platform too. tile_arm64.h alone
// includes this, twice: inside namespace stoker::neon with STOKER_I8MM 0 and inside stoker::i8mm
// with STOKER_I8MM 1, each inside its target region.
//
// A register q[j] holds, in 32-bit lane r, the bytes u[4j .. 4j+3] of row r; u = q + zero point.

using V = uint32x4_t;
using VF = float32x4_t;
inline constexpr int kRows = 4;
// The micro-kernel's register tile: kSubtiles x 4 rows by up to kTokens tokens.
inline constexpr int kSubtiles = 2;
inline constexpr int kTokens = 4;
// Up to this many tokens are multiplied without a panel (4 or 2): 3 and 4 leave no registers for
// the unpacking, and take up to twice the instructions that way.
inline constexpr int kFewTokens = 2;
// Products are of signed bytes: codes above 127 are stored as q, not as u.
template <int kMax>
inline constexpr bool kSignedWeights = (kMax > 127);
constexpr int micro_max(int) { return 127; }

// The rows of one tile, at one unit of each row. Four streams are few enough for the hardware's
// prefetchers, so that nothing is prefetched here.
struct Rows {
  const uint8_t* base;
  int64_t stride;  // bytes
  int unit_bytes;
  STOKER_INLINE Rows(const uint8_t* w, int64_t row_bytes, const uint8_t*, int unit)
      : base(w), stride(row_bytes), unit_bytes(unit) {}
  STOKER_INLINE const uint8_t* at(int r) const { return base + r * stride; }
  STOKER_INLINE void advance() { base += unit_bytes; }
};

STOKER_INLINE V from_bytes(uint8x16_t a) { return vreinterpretq_u32_u8(a); }
STOKER_INLINE uint8x16_t as_bytes(V a) { return vreinterpretq_u8_u32(a); }
STOKER_INLINE int8x16_t as_codes(V a) { return vreinterpretq_s8_u32(a); }
STOKER_INLINE int32x4_t as_int(V a) { return vreinterpretq_s32_u32(a); }
STOKER_INLINE V from_int(int32x4_t a) { return vreinterpretq_u32_s32(a); }

STOKER_INLINE V set8(int x) { return from_bytes(vdupq_n_u8(static_cast<uint8_t>(x))); }
STOKER_INLINE V set32(uint32_t x) { return vdupq_n_u32(x); }
STOKER_INLINE V bit_and(V a, V b) { return vandq_u32(a, b); }
STOKER_INLINE V bit_or(V a, V b) { return vorrq_u32(a, b); }
STOKER_INLINE V bit_xor(V a, V b) { return veorq_u32(a, b); }
// (a & mask) | b, where b has none of the mask's bits: one instruction.
STOKER_INLINE V and_or(V a, V mask, V b) { return vbslq_u32(mask, a, b); }
template <int kBits>
STOKER_INLINE V shift_right(V a) {
  if constexpr (kBits == 0) return a;
  if constexpr (kBits != 0) return vshrq_n_u32(a, kBits);
}
template <int kBits>
STOKER_INLINE V shift_left(V a) {
  return vshlq_n_u32(a, kBits);
}
// Returns the upper four bits of every byte.
STOKER_INLINE V high_nibbles(V a) { return from_bytes(vshrq_n_u8(as_bytes(a), 4)); }
STOKER_INLINE V add32(V a, V b) { return vaddq_u32(a, b); }
STOKER_INLINE V sub32(V a, V b) { return vsubq_u32(a, b); }
STOKER_INLINE V max32(V a, V b) { return from_int(vmaxq_s32(as_int(a), as_int(b))); }  // signed
STOKER_INLINE VF to_float(V a) { return vcvtq_f32_s32(as_int(a)); }
STOKER_INLINE VF as_float(V a) { return vreinterpretq_f32_u32(a); }
STOKER_INLINE VF mul(VF a, VF b) { return vmulq_f32(a, b); }
STOKER_INLINE VF negate(VF a) { return vnegq_f32(a); }
// byte returns byte i of every lane zero-extended, signed_byte sign-extended.
template <int i>
STOKER_INLINE V byte(V a) {
  return vshrq_n_u32(shift_left<24 - 8 * i>(a), 24);
}
template <int i>
STOKER_INLINE V signed_byte(V a) {
  return from_int(vshrq_n_s32(as_int(shift_left<24 - 8 * i>(a)), 24));
}
// lookup returns table[index[.]] for a 16-byte table; the indices are 0..15.
STOKER_INLINE V table16(const int8_t* table) { return vreinterpretq_u32_s8(vld1q_s8(table)); }
STOKER_INLINE V lookup(V table, V index) {
  return from_bytes(vqtbl1q_u8(as_bytes(table), as_bytes(index)));
}
// Returns bits 4j .. 4j+3 of each lane's word as bit 4 of the lane's four bytes; the other bits are
// arbitrary.
template <int j>
STOKER_INLINE V bits_to_bit4(V word) {
  // Byte j / 2 of every word is repeated four times, then one bit of each copy is tested.
  constexpr uint32_t kLane = 0x01010101u * (j / 2);
  const uint32x4_t lane = {kLane, kLane + 0x04040404u, kLane + 0x08080808u, kLane + 0x0c0c0c0cu};
  const uint8x16_t spread = vqtbl1q_u8(as_bytes(word), as_bytes(lane));
  const V bit = set32(j % 2 == 0 ? 0x08040201u : 0x80402010u);
  return from_bytes(vtstq_u8(spread, as_bytes(bit)));
}

STOKER_INLINE int load_int32(const void* p) {
  int x;
  __builtin_memcpy(&x, p, 4);
  return x;
}

// Sets lane r of out[j] to bytes at + 4j .. at + 4j+3 of row r. (The last parameter is for the ISAs
// that prefetch.)
STOKER_INLINE void load_columns(const Rows& rows, int at, V out[4], int = 0) {
  const V x0 = from_bytes(vld1q_u8(rows.at(0) + at)), x1 = from_bytes(vld1q_u8(rows.at(1) + at));
  const V x2 = from_bytes(vld1q_u8(rows.at(2) + at)), x3 = from_bytes(vld1q_u8(rows.at(3) + at));
  const uint64x2_t t0 = vreinterpretq_u64_u32(vzip1q_u32(x0, x1));
  const uint64x2_t t1 = vreinterpretq_u64_u32(vzip2q_u32(x0, x1));
  const uint64x2_t t2 = vreinterpretq_u64_u32(vzip1q_u32(x2, x3));
  const uint64x2_t t3 = vreinterpretq_u64_u32(vzip2q_u32(x2, x3));
  out[0] = vreinterpretq_u32_u64(vzip1q_u64(t0, t2));
  out[1] = vreinterpretq_u32_u64(vzip2q_u64(t0, t2));
  out[2] = vreinterpretq_u32_u64(vzip1q_u64(t1, t3));
  out[3] = vreinterpretq_u32_u64(vzip2q_u64(t1, t3));
}
// load_words loads the 4 bytes at `at` of every row.
STOKER_INLINE V load_words(const Rows& rows, int at) {
  const auto word = [&](int r) { return reinterpret_cast<const uint32_t*>(rows.at(r) + at); };
  V x = vld1q_dup_u32(word(0));
  x = vld1q_lane_u32(word(1), x, 1);
  x = vld1q_lane_u32(word(2), x, 2);
  return vld1q_lane_u32(word(3), x, 3);
}
// load_f16 loads the f16 at `at` of every row; low_f16 and high_f16 return the f16 in the low or
// high half of every lane.
STOKER_INLINE VF load_f16(const Rows& rows, int at) {
  const auto half = [&](int r) { return reinterpret_cast<const uint16_t*>(rows.at(r) + at); };
  uint16x4_t x = vld1_dup_u16(half(0));
  x = vld1_lane_u16(half(1), x, 1);
  x = vld1_lane_u16(half(2), x, 2);
  x = vld1_lane_u16(half(3), x, 3);
  return vcvt_f32_f16(vreinterpret_f16_u16(x));
}
STOKER_INLINE VF low_f16(V a) { return vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(a))); }
STOKER_INLINE VF high_f16(V a) { return vcvt_f32_f16(vreinterpret_f16_u16(vshrn_n_u32(a, 16))); }
// Loads the byte at `at` of every row, zero-extended.
STOKER_INLINE V load_bytes(const Rows& rows, int at) {
  V x = vdupq_n_u32(rows.at(0)[at]);
  x = vsetq_lane_u32(rows.at(1)[at], x, 1);
  x = vsetq_lane_u32(rows.at(2)[at], x, 2);
  return vsetq_lane_u32(rows.at(3)[at], x, 3);
}

// The lanes [low, high) of a tile, which belong to the caller's rows.
struct Lanes {
  int low, high;
  STOKER_INLINE Lanes(int64_t first, int64_t end)
      : low(static_cast<int>(first)), high(static_cast<int>(end)) {}
};
STOKER_INLINE VF zero_f() { return vdupq_n_f32(0); }
STOKER_INLINE VF load_f(const float* p) { return vld1q_f32(p); }
STOKER_INLINE VF load_f(const float* p, Lanes n) {
  float lanes[4] = {};
  for (int i = n.low; i < n.high; ++i) lanes[i] = p[i];
  return vld1q_f32(lanes);
}
STOKER_INLINE void store_f(float* p, VF v) { vst1q_f32(p, v); }
STOKER_INLINE void store_f(float* p, VF v, Lanes n) {
  float lanes[4];
  vst1q_f32(lanes, v);
  for (int i = n.low; i < n.high; ++i) p[i] = lanes[i];
}
STOKER_INLINE VF set_f(float x) { return vdupq_n_f32(x); }
STOKER_INLINE VF fma(VF a, VF b, VF c) { return vfmaq_f32(c, a, b); }
STOKER_INLINE V load_v(const uint8_t* p) { return from_bytes(vld1q_u8(p)); }
STOKER_INLINE void store_v(uint8_t* p, V v) { vst1q_u8(p, as_bytes(v)); }

// Loads sixteen activations of one token.
template <class Acts>
STOKER_INLINE int8x16_t load_acts(const Acts& acts, int t, int at) {
  return vld1q_s8(reinterpret_cast<const int8_t*>(acts(t)) + at);
}

// sum[m][t] += sum over a group of q * a, for tokens begin..kCount - 1.
template <int kGroup, int kSub, int kCount, int begin, class Weights, class Acts>
STOKER_INLINE void dot_products(const Weights& weights, const Acts& acts, V (&sum)[kSub][kCount]) {
#pragma GCC unroll 2
  for (int j = 0; j < kGroup / 4; j += 4) {
#pragma GCC unroll 2
    for (int m = 0; m < kSub; ++m) {
      const int8x16_t w0 = as_codes(weights(m, j)), w1 = as_codes(weights(m, j + 1));
      const int8x16_t w2 = as_codes(weights(m, j + 2)), w3 = as_codes(weights(m, j + 3));
#pragma GCC unroll 8
      for (int t = begin; t < kCount; ++t) {
        const int8x16_t a = load_acts(acts, t, 4 * j);
        int32x4_t s = as_int(sum[m][t]);
        s = vdotq_laneq_s32(s, w0, a, 0);
        s = vdotq_laneq_s32(s, w1, a, 1);
        s = vdotq_laneq_s32(s, w2, a, 2);
        sum[m][t] = from_int(vdotq_laneq_s32(s, w3, a, 3));
      }
    }
  }
}

#if STOKER_I8MM
STOKER_INLINE int8x16_t zip_low64(int8x16_t a, int8x16_t b) {
  return vreinterpretq_s8_s64(vzip1q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b)));
}
STOKER_INLINE int8x16_t zip_high64(int8x16_t a, int8x16_t b) {
  return vreinterpretq_s8_s64(vzip2q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b)));
}

// Does the same for pairs of tokens: smmla multiplies 2 rows x 8 weights by 8 x 2 tokens.
template <int kGroup, int kSub, int kCount, class Weights, class Acts>
STOKER_INLINE void matrix_products(const Weights& weights, const Acts& acts,
                                   V (&sum)[kSub][kCount]) {
  constexpr int kPairs = kCount / 2;
  int32x4_t rows01[kSub][kPairs], rows23[kSub][kPairs];  // [row][token] of 2 rows x 2 tokens
#pragma GCC unroll 2
  for (int m = 0; m < kSub; ++m) {
#pragma GCC unroll 4
    for (int p = 0; p < kPairs; ++p) {
      rows01[m][p] = vzip1q_s32(as_int(sum[m][2 * p]), as_int(sum[m][2 * p + 1]));
      rows23[m][p] = vzip2q_s32(as_int(sum[m][2 * p]), as_int(sum[m][2 * p + 1]));
    }
  }
#pragma GCC unroll 2
  for (int j = 0; j < kGroup / 4; j += 4) {
    int8x16_t low[kPairs], high[kPairs];  // weights 4j .. 4j+7 and 4j+8 .. 4j+15 of two tokens
#pragma GCC unroll 4
    for (int p = 0; p < kPairs; ++p) {
      const int8x16_t a = load_acts(acts, 2 * p, 4 * j), b = load_acts(acts, 2 * p + 1, 4 * j);
      low[p] = zip_low64(a, b);
      high[p] = zip_high64(a, b);
    }
#pragma GCC unroll 2
    for (int m = 0; m < kSub; ++m) {
      const V w0 = weights(m, j), w1 = weights(m, j + 1);
      const V w2 = weights(m, j + 2), w3 = weights(m, j + 3);
      const int8x16_t low01 = as_codes(vzip1q_u32(w0, w1)), low23 = as_codes(vzip2q_u32(w0, w1));
      const int8x16_t high01 = as_codes(vzip1q_u32(w2, w3)), high23 = as_codes(vzip2q_u32(w2, w3));
#pragma GCC unroll 4
      for (int p = 0; p < kPairs; ++p) {
        rows01[m][p] = vmmlaq_s32(rows01[m][p], low01, low[p]);
        rows23[m][p] = vmmlaq_s32(rows23[m][p], low23, low[p]);
        rows01[m][p] = vmmlaq_s32(rows01[m][p], high01, high[p]);
        rows23[m][p] = vmmlaq_s32(rows23[m][p], high23, high[p]);
      }
    }
  }
#pragma GCC unroll 2
  for (int m = 0; m < kSub; ++m) {
#pragma GCC unroll 4
    for (int p = 0; p < kPairs; ++p) {
      sum[m][2 * p] = from_int(vuzp1q_s32(rows01[m][p], rows23[m][p]));
      sum[m][2 * p + 1] = from_int(vuzp2q_s32(rows01[m][p], rows23[m][p]));
    }
  }
}
#endif

// sum[m][t] += sum over a group of q * a, for kSub registers of rows and kCount tokens.
// weights(m, j) gives register j of subtile m, acts(t) the address of token t's activations.
template <int kGroup, int kMax, int kSub, int kCount, class Weights, class Acts>
STOKER_INLINE void dot_group(const Weights& weights, const Acts& acts, V (&sum)[kSub][kCount]) {
#if STOKER_I8MM
  if constexpr (kCount > 1) matrix_products<kGroup>(weights, acts, sum);
  if constexpr (kCount % 2 == 1) {
    dot_products<kGroup, kSub, kCount, kCount - 1>(weights, acts, sum);
  }
#else
  dot_products<kGroup, kSub, kCount, 0>(weights, acts, sum);
#endif
}
