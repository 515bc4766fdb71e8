// AVX2 and AVX-VNNI: the vector operations that the unpackers in formats/unpack/ are written in,
// and the inner product of a group, for tiles of 8 rows. tile_x86.h alone includes this, twice:
// inside namespace stoker::avx2 with STOKER_VNNI 0 and inside stoker::avxvnni with STOKER_VNNI 1,
// each inside its target region.
//
// A register q[j] holds, in 32-bit lane r, the bytes u[4j .. 4j+3] of row r; u = q + zero point.

using V = __m256i;
using VF = __m256;
inline constexpr int kRows = 8;
// The micro-kernel's register tile: kSubtiles x 8 rows by up to kTokens tokens.
inline constexpr int kSubtiles = 2;
inline constexpr int kTokens = 4;
// Up to this many tokens are multiplied without a panel (4 or 2).
inline constexpr int kFewTokens = 4;
// vpmaddubsw adds two products in 16 bits, which would saturate with weights above 127: there the
// sign of the weight moves to the activation instead.
template <int kMax>
inline constexpr bool kSignedWeights = !STOKER_VNNI && (kMax > 127);
constexpr int micro_max(int max) { return STOKER_VNNI ? 255 : max; }

// The rows of one tile, at one unit of each row.
struct Rows {
  const uint8_t* base[2];   // rows 0, 4
  int64_t stride, stride3;  // bytes
  const uint8_t* next;      // what a later tile will read, kRows units one after the other
  int unit_bytes;           // of the format: a constant once this is inlined

  STOKER_INLINE Rows(const uint8_t* w, int64_t row_bytes, const uint8_t* later, int unit)
      : base{w, w + 4 * row_bytes},
        stride(row_bytes),
        stride3(3 * row_bytes),
        next(later),
        unit_bytes(unit) {}
  STOKER_INLINE const uint8_t* at(int r) const {
    const int i = r & 3;
    return base[r >> 2] + (i == 0 ? 0 : i == 1 ? stride : i == 2 ? 2 * stride : stride3);
  }
  STOKER_INLINE void advance() {
    for (auto& p : base) p += unit_bytes;
    next += kRows * unit_bytes;
  }
  // The hardware's prefetchers cannot follow as many streams as a tile has rows. But the bytes of a
  // later tile are contiguous: while bytes [from, to) of every row's unit are read, the same share
  // of that tile is prefetched. Spread like this, the prefetches never fill the queue.
  STOKER_INLINE void fetch(int from, int to) const {
#pragma GCC unroll 16
    for (int i = (from * kRows + 63) / 64; i < (to * kRows + 63) / 64; ++i) {
      __builtin_prefetch(next + 64 * i);
    }
    // Tiles larger than the first-level cache come back from the second in bursts, a long unit at a
    // time, and the bursts hold up the requests to memory. The rows' own next unit is therefore
    // prefetched too.
    if (unit_bytes > 64) {
      const int first = from % 64 / 16 * (kRows / 4);  // a quarter of the rows at every call
#pragma GCC unroll 4
      for (int i = 0; i < kRows / 4; ++i) {
        __builtin_prefetch(at(first + i) + unit_bytes + from / 64 * 64);
      }
    }
  }
};

STOKER_INLINE V set8(int x) { return _mm256_set1_epi8(static_cast<char>(x)); }
STOKER_INLINE V set32(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
STOKER_INLINE V bit_and(V a, V b) { return _mm256_and_si256(a, b); }
STOKER_INLINE V bit_or(V a, V b) { return _mm256_or_si256(a, b); }
STOKER_INLINE V bit_xor(V a, V b) { return _mm256_xor_si256(a, b); }
// (a & mask) | b
STOKER_INLINE V and_or(V a, V mask, V b) { return bit_or(bit_and(a, mask), b); }
template <int kBits>
STOKER_INLINE V shift_right(V a) {
  return _mm256_srli_epi32(a, kBits);
}
template <int kBits>
STOKER_INLINE V shift_left(V a) {
  return _mm256_slli_epi32(a, kBits);
}
// Returns the upper four bits of every byte.
STOKER_INLINE V high_nibbles(V a) { return bit_and(shift_right<4>(a), set8(15)); }
STOKER_INLINE V add32(V a, V b) { return _mm256_add_epi32(a, b); }
STOKER_INLINE V sub32(V a, V b) { return _mm256_sub_epi32(a, b); }
STOKER_INLINE V max32(V a, V b) { return _mm256_max_epi32(a, b); }
STOKER_INLINE VF to_float(V a) { return _mm256_cvtepi32_ps(a); }
STOKER_INLINE VF as_float(V a) { return _mm256_castsi256_ps(a); }
STOKER_INLINE VF mul(VF a, VF b) { return _mm256_mul_ps(a, b); }
STOKER_INLINE VF negate(VF a) {
  return _mm256_castsi256_ps(_mm256_xor_si256(_mm256_castps_si256(a), set32(0x80000000u)));
}
// byte returns byte i of every lane zero-extended, signed_byte sign-extended.
template <int i>
STOKER_INLINE V byte(V a) {
  if constexpr (i == 3) return _mm256_srli_epi32(a, 24);
  return _mm256_and_si256(_mm256_srli_epi32(a, 8 * i), set32(0xff));
}
template <int i>
STOKER_INLINE V signed_byte(V a) {
  return _mm256_srai_epi32(_mm256_slli_epi32(a, 24 - 8 * i), 24);
}
// lookup returns table[index[.]] for a 16-byte table; the indices are 0..15.
STOKER_INLINE V table16(const int8_t* table) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
}
STOKER_INLINE V lookup(V table, V index) { return _mm256_shuffle_epi8(table, index); }
// Returns bits 4j .. 4j+3 of each lane's word as bit 4 of the lane's four bytes; the other bits are
// arbitrary.
template <int j>
STOKER_INLINE V bits_to_bit4(V word) {
  // Byte j / 2 of every word is repeated four times, then one bit of each copy is tested.
  constexpr int kLane = 0x01010101 * (j / 2);
  const V spread = _mm256_shuffle_epi8(
      word, _mm256_setr_epi32(kLane, kLane + 0x04040404, kLane + 0x08080808, kLane + 0x0c0c0c0c,
                              kLane, kLane + 0x04040404, kLane + 0x08080808, kLane + 0x0c0c0c0c));
  const V bit = set32(j % 2 == 0 ? 0x08040201u : 0x80402010u);
  return _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
}

STOKER_INLINE __m128i load_128(const uint8_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
STOKER_INLINE int load_int32(const void* p) {
  int x;
  std::memcpy(&x, p, 4);
  return x;
}
STOKER_INLINE int load_uint16(const uint8_t* p) {
  uint16_t x;
  std::memcpy(&x, p, 2);
  return x;
}

// Loads 16 bytes each of rows i and 4 + i.
STOKER_INLINE V half(const Rows& rows, int at, int i) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(load_128(rows.at(i) + at)),
                                 load_128(rows.at(4 + i) + at), 1);
}
// Sets lane r of out[j] to bytes at + 4j .. at + 4j+3 of row r; the first `fetched` of the 16 bytes
// have been read (and their share of the later tile been prefetched) before.
STOKER_INLINE void load_columns(const Rows& rows, int at, V out[4], int fetched = 0) {
  rows.fetch(at + fetched, at + 16);
  const V x0 = half(rows, at, 0), x1 = half(rows, at, 1);
  const V x2 = half(rows, at, 2), x3 = half(rows, at, 3);
  const V t0 = _mm256_unpacklo_epi32(x0, x1), t1 = _mm256_unpackhi_epi32(x0, x1);
  const V t2 = _mm256_unpacklo_epi32(x2, x3), t3 = _mm256_unpackhi_epi32(x2, x3);
  out[0] = _mm256_unpacklo_epi64(t0, t2);
  out[1] = _mm256_unpackhi_epi64(t0, t2);
  out[2] = _mm256_unpacklo_epi64(t1, t3);
  out[3] = _mm256_unpackhi_epi64(t1, t3);
}
// load_words loads the 4 bytes at `at` of every row.
STOKER_INLINE __m128i four_words(const Rows& rows, int at, int r) {
  __m128i x = _mm_cvtsi32_si128(load_int32(rows.at(r) + at));
  x = _mm_insert_epi32(x, load_int32(rows.at(r + 1) + at), 1);
  x = _mm_insert_epi32(x, load_int32(rows.at(r + 2) + at), 2);
  return _mm_insert_epi32(x, load_int32(rows.at(r + 3) + at), 3);
}
STOKER_INLINE V load_words(const Rows& rows, int at) {
  rows.fetch(at, at + 4);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(four_words(rows, at, 0)),
                                 four_words(rows, at, 4), 1);
}
// load_f16 loads the f16 at `at` of every row; low_f16 and high_f16 return the f16 in the low or
// high half of every lane.
STOKER_INLINE VF load_f16(const Rows& rows, int at) {
  rows.fetch(at, at + 2);
  __m128i x = _mm_cvtsi32_si128(load_uint16(rows.at(0) + at));
  x = _mm_insert_epi16(x, load_uint16(rows.at(1) + at), 1);
  x = _mm_insert_epi16(x, load_uint16(rows.at(2) + at), 2);
  x = _mm_insert_epi16(x, load_uint16(rows.at(3) + at), 3);
  x = _mm_insert_epi16(x, load_uint16(rows.at(4) + at), 4);
  x = _mm_insert_epi16(x, load_uint16(rows.at(5) + at), 5);
  x = _mm_insert_epi16(x, load_uint16(rows.at(6) + at), 6);
  x = _mm_insert_epi16(x, load_uint16(rows.at(7) + at), 7);
  return _mm256_cvtph_ps(x);
}
STOKER_INLINE VF high_f16(V a) {
  const V upper = _mm256_srli_epi32(a, 16);
  return _mm256_cvtph_ps(
      _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1)));
}
STOKER_INLINE VF low_f16(V a) { return high_f16(_mm256_slli_epi32(a, 16)); }
// Loads the byte at `at` of every row, zero-extended.
STOKER_INLINE V load_bytes(const Rows& rows, int at) {
  rows.fetch(at, at + 1);
  __m128i x = _mm_setzero_si128();
  x = _mm_insert_epi8(x, rows.at(0)[at], 0);
  x = _mm_insert_epi8(x, rows.at(1)[at], 1);
  x = _mm_insert_epi8(x, rows.at(2)[at], 2);
  x = _mm_insert_epi8(x, rows.at(3)[at], 3);
  x = _mm_insert_epi8(x, rows.at(4)[at], 4);
  x = _mm_insert_epi8(x, rows.at(5)[at], 5);
  x = _mm_insert_epi8(x, rows.at(6)[at], 6);
  x = _mm_insert_epi8(x, rows.at(7)[at], 7);
  return _mm256_cvtepu8_epi32(x);
}

// The lanes [low, high) of a tile, which belong to the caller's rows.
struct Lanes {
  V mask;
  STOKER_INLINE Lanes(int64_t low, int64_t high) {
    const V lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    mask = _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(low)), lane),
                               _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(high)), lane));
  }
};
STOKER_INLINE VF zero_f() { return _mm256_setzero_ps(); }
STOKER_INLINE VF load_f(const float* p) { return _mm256_loadu_ps(p); }
STOKER_INLINE VF load_f(const float* p, Lanes n) { return _mm256_maskload_ps(p, n.mask); }
STOKER_INLINE void store_f(float* p, VF v) { _mm256_storeu_ps(p, v); }
STOKER_INLINE void store_f(float* p, VF v, Lanes n) { _mm256_maskstore_ps(p, n.mask, v); }
STOKER_INLINE VF set_f(float x) { return _mm256_set1_ps(x); }
STOKER_INLINE VF fma(VF a, VF b, VF c) { return _mm256_fmadd_ps(a, b, c); }
STOKER_INLINE V load_v(const uint8_t* p) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
}
STOKER_INLINE void store_v(uint8_t* p, V v) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(p), v);
}

// sum[m][t] += sum over a group of u * a, for kSub registers of rows and kCount tokens.
// weights(m, j) gives register j of subtile m, acts(t) the address of token t's activations.
template <int kGroup, int kMax, int kSub, int kCount, class Weights, class Acts>
STOKER_INLINE void dot_group(const Weights& weights, const Acts& acts, V (&sum)[kSub][kCount]) {
#if STOKER_VNNI
#pragma GCC unroll 8
  for (int j = 0; j < kGroup / 4; ++j) {
    V w[kSub];
#pragma GCC unroll 2
    for (int m = 0; m < kSub; ++m) w[m] = weights(m, j);
#pragma GCC unroll 8
    for (int t = 0; t < kCount; ++t) {
      const V a = _mm256_set1_epi32(load_int32(acts(t) + 4 * j));
#pragma GCC unroll 2
      for (int m = 0; m < kSub; ++m) sum[m][t] = _mm256_dpbusd_avx_epi32(sum[m][t], w[m], a);
    }
  }
#else
  const V ones = _mm256_set1_epi16(1);
  if constexpr (kSignedWeights<kMax>) {
#pragma GCC unroll 8
    for (int j = 0; j < kGroup / 4; ++j) {
      V w[kSub], magnitude[kSub];
#pragma GCC unroll 2
      for (int m = 0; m < kSub; ++m) {
        w[m] = weights(m, j);
        magnitude[m] = _mm256_abs_epi8(w[m]);
      }
#pragma GCC unroll 8
      for (int t = 0; t < kCount; ++t) {
        const V a = _mm256_set1_epi32(load_int32(acts(t) + 4 * j));
#pragma GCC unroll 2
        for (int m = 0; m < kSub; ++m) {
          // |q| <= 128 and |a| <= 127: two products stay below 2^15.
          const V pair = _mm256_maddubs_epi16(magnitude[m], _mm256_sign_epi8(a, w[m]));
          sum[m][t] = _mm256_add_epi32(sum[m][t], _mm256_madd_epi16(pair, ones));
        }
      }
    }
  } else {
    constexpr int kFit = 32767 / (2 * 127 * kMax);  // steps whose sum fits 16 bits
    constexpr int kPower = kFit >= 8 ? 8 : kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
    constexpr int kSteps = kPower < kGroup / 4 ? kPower : kGroup / 4;
#pragma GCC unroll 8
    for (int first = 0; first < kGroup / 4; first += kSteps) {
      V pair[kSub][kCount];
#pragma GCC unroll 8
      for (int i = 0; i < kSteps; ++i) {
        const int j = first + i;
        V w[kSub];
#pragma GCC unroll 2
        for (int m = 0; m < kSub; ++m) w[m] = weights(m, j);
#pragma GCC unroll 8
        for (int t = 0; t < kCount; ++t) {
          const V a = _mm256_set1_epi32(load_int32(acts(t) + 4 * j));
#pragma GCC unroll 2
          for (int m = 0; m < kSub; ++m) {
            const V p = _mm256_maddubs_epi16(w[m], a);
            pair[m][t] = i == 0 ? p : _mm256_add_epi16(pair[m][t], p);
          }
        }
      }
#pragma GCC unroll 8
      for (int t = 0; t < kCount; ++t) {
#pragma GCC unroll 2
        for (int m = 0; m < kSub; ++m) {
          sum[m][t] = _mm256_add_epi32(sum[m][t], _mm256_madd_epi16(pair[m][t], ones));
        }
      }
    }
  }
#endif
}
