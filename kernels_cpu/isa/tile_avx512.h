// AVX-512: the vector operations that the unpackers in formats/unpack/ are written in, and the
// inner product of a group, for tiles of 16 rows. tile_x86.h alone includes this, inside namespace
// stoker::avx512 and the target region.
//
// A register q[j] holds, in 32-bit lane r, the bytes u[4j .. 4j+3] of row r; u = q + zero point.

using V = __m512i;
using VF = __m512;
inline constexpr int kRows = 16;
// The micro-kernel's register tile: kSubtiles x 16 rows by up to kTokens tokens.
inline constexpr int kSubtiles = 2;
inline constexpr int kTokens = 6;
// Up to this many tokens are multiplied without a panel (4 or 2).
inline constexpr int kFewTokens = 4;
// This ISA multiplies unsigned weights with signed activations without saturating.
template <int kMax>
inline constexpr bool kSignedWeights = false;
constexpr int micro_max(int) { return 255; }

// The rows of one tile, at one unit of each row.
struct Rows {
  const uint8_t* base[4];   // rows 0, 4, 8, 12
  int64_t stride, stride3;  // bytes
  const uint8_t* next;      // what a later tile will read, kRows units one after the other
  int unit_bytes;           // of the format: a constant once this is inlined

  STOKER_INLINE Rows(const uint8_t* w, int64_t row_bytes, const uint8_t* later, int unit)
      : base{w, w + 4 * row_bytes, w + 8 * row_bytes, w + 12 * row_bytes},
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

STOKER_INLINE V set8(int x) { return _mm512_set1_epi8(static_cast<char>(x)); }
STOKER_INLINE V set32(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
STOKER_INLINE V bit_and(V a, V b) { return _mm512_and_si512(a, b); }
STOKER_INLINE V bit_or(V a, V b) { return _mm512_or_si512(a, b); }
STOKER_INLINE V bit_xor(V a, V b) { return _mm512_xor_si512(a, b); }
// (a & mask) | b
STOKER_INLINE V and_or(V a, V mask, V b) { return _mm512_ternarylogic_epi32(a, mask, b, 0xea); }
template <int kBits>
STOKER_INLINE V shift_right(V a) {
  return _mm512_srli_epi32(a, kBits);
}
template <int kBits>
STOKER_INLINE V shift_left(V a) {
  return _mm512_slli_epi32(a, kBits);
}
// Returns the upper four bits of every byte.
STOKER_INLINE V high_nibbles(V a) { return bit_and(shift_right<4>(a), set8(15)); }
STOKER_INLINE V add32(V a, V b) { return _mm512_add_epi32(a, b); }
STOKER_INLINE V sub32(V a, V b) { return _mm512_sub_epi32(a, b); }
STOKER_INLINE V max32(V a, V b) { return _mm512_max_epi32(a, b); }
STOKER_INLINE VF to_float(V a) { return _mm512_cvtepi32_ps(a); }
STOKER_INLINE VF as_float(V a) { return _mm512_castsi512_ps(a); }
STOKER_INLINE VF mul(VF a, VF b) { return _mm512_mul_ps(a, b); }
STOKER_INLINE VF negate(VF a) {
  return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a), set32(0x80000000u)));
}
// byte returns byte i of every lane zero-extended, signed_byte sign-extended.
template <int i>
STOKER_INLINE V byte(V a) {
  if constexpr (i == 3) return _mm512_srli_epi32(a, 24);
  return _mm512_and_si512(_mm512_srli_epi32(a, 8 * i), set32(0xff));
}
template <int i>
STOKER_INLINE V signed_byte(V a) {
  return _mm512_srai_epi32(_mm512_slli_epi32(a, 24 - 8 * i), 24);
}
// lookup returns table[index[.]] for a 16-byte table; the indices are 0..15.
STOKER_INLINE V table16(const int8_t* table) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
}
STOKER_INLINE V lookup(V table, V index) { return _mm512_shuffle_epi8(table, index); }
// Returns bits 4j .. 4j+3 of each lane's word as bit 4 of the lane's four bytes; the other bits are
// arbitrary.
template <int j>
STOKER_INLINE V bits_to_bit4(V word) {
  // Each byte takes 8 bits of its 64-bit lane, beginning 4 below the wanted bit (modulo 64).
  constexpr uint64_t kLow = (4 * j + 60) % 64;
  constexpr uint64_t kStart = ((kLow + 0) % 64) | ((kLow + 1) % 64) << 8 | ((kLow + 2) % 64) << 16 |
                              ((kLow + 3) % 64) << 24;
  constexpr uint64_t kHigh = (4 * j + 92) % 64;
  constexpr uint64_t kStartHigh = ((kHigh + 0) % 64) | ((kHigh + 1) % 64) << 8 |
                                  ((kHigh + 2) % 64) << 16 | ((kHigh + 3) % 64) << 24;
  return _mm512_multishift_epi64_epi8(
      _mm512_set1_epi64(static_cast<int64_t>(kStart | kStartHigh << 32)), word);
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

// Loads 16 bytes each of rows i, 4 + i, 8 + i and 12 + i.
STOKER_INLINE V quarter(const Rows& rows, int at, int i) {
  V x = _mm512_castsi128_si512(load_128(rows.at(i) + at));
  x = _mm512_inserti32x4(x, load_128(rows.at(4 + i) + at), 1);
  x = _mm512_inserti32x4(x, load_128(rows.at(8 + i) + at), 2);
  return _mm512_inserti32x4(x, load_128(rows.at(12 + i) + at), 3);
}
// Sets lane r of out[j] to bytes at + 4j .. at + 4j+3 of row r; the first `fetched` of the 16 bytes
// have been read (and their share of the later tile been prefetched) before.
STOKER_INLINE void load_columns(const Rows& rows, int at, V out[4], int fetched = 0) {
  rows.fetch(at + fetched, at + 16);
  const V x0 = quarter(rows, at, 0), x1 = quarter(rows, at, 1);
  const V x2 = quarter(rows, at, 2), x3 = quarter(rows, at, 3);
  const V t0 = _mm512_unpacklo_epi32(x0, x1), t1 = _mm512_unpackhi_epi32(x0, x1);
  const V t2 = _mm512_unpacklo_epi32(x2, x3), t3 = _mm512_unpackhi_epi32(x2, x3);
  out[0] = _mm512_unpacklo_epi64(t0, t2);
  out[1] = _mm512_unpackhi_epi64(t0, t2);
  out[2] = _mm512_unpacklo_epi64(t1, t3);
  out[3] = _mm512_unpackhi_epi64(t1, t3);
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
  V x = _mm512_castsi128_si512(four_words(rows, at, 0));
  x = _mm512_inserti32x4(x, four_words(rows, at, 4), 1);
  x = _mm512_inserti32x4(x, four_words(rows, at, 8), 2);
  return _mm512_inserti32x4(x, four_words(rows, at, 12), 3);
}
// load_f16 loads the f16 at `at` of every row; low_f16 and high_f16 return the f16 in the low or
// high half of every lane.
STOKER_INLINE __m128i eight_halves(const Rows& rows, int at, int r) {
  __m128i x = _mm_cvtsi32_si128(load_uint16(rows.at(r) + at));
  x = _mm_insert_epi16(x, load_uint16(rows.at(r + 1) + at), 1);
  x = _mm_insert_epi16(x, load_uint16(rows.at(r + 2) + at), 2);
  x = _mm_insert_epi16(x, load_uint16(rows.at(r + 3) + at), 3);
  x = _mm_insert_epi16(x, load_uint16(rows.at(r + 4) + at), 4);
  x = _mm_insert_epi16(x, load_uint16(rows.at(r + 5) + at), 5);
  x = _mm_insert_epi16(x, load_uint16(rows.at(r + 6) + at), 6);
  return _mm_insert_epi16(x, load_uint16(rows.at(r + 7) + at), 7);
}
STOKER_INLINE VF load_f16(const Rows& rows, int at) {
  rows.fetch(at, at + 2);
  return _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(eight_halves(rows, at, 0)),
                                                 eight_halves(rows, at, 8), 1));
}
STOKER_INLINE VF low_f16(V a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a)); }
STOKER_INLINE VF high_f16(V a) { return low_f16(_mm512_srli_epi32(a, 16)); }
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
  x = _mm_insert_epi8(x, rows.at(8)[at], 8);
  x = _mm_insert_epi8(x, rows.at(9)[at], 9);
  x = _mm_insert_epi8(x, rows.at(10)[at], 10);
  x = _mm_insert_epi8(x, rows.at(11)[at], 11);
  x = _mm_insert_epi8(x, rows.at(12)[at], 12);
  x = _mm_insert_epi8(x, rows.at(13)[at], 13);
  x = _mm_insert_epi8(x, rows.at(14)[at], 14);
  x = _mm_insert_epi8(x, rows.at(15)[at], 15);
  return _mm512_cvtepu8_epi32(x);
}

// The lanes [low, high) of a tile, which belong to the caller's rows.
struct Lanes {
  __mmask16 mask;
  STOKER_INLINE Lanes(int64_t low, int64_t high)
      : mask(static_cast<__mmask16>((0xffffu >> (16 - high)) & (0xffffu << low))) {}
};
STOKER_INLINE VF zero_f() { return _mm512_setzero_ps(); }
STOKER_INLINE VF load_f(const float* p) { return _mm512_loadu_ps(p); }
STOKER_INLINE VF load_f(const float* p, Lanes n) { return _mm512_maskz_loadu_ps(n.mask, p); }
STOKER_INLINE void store_f(float* p, VF v) { _mm512_storeu_ps(p, v); }
STOKER_INLINE void store_f(float* p, VF v, Lanes n) { _mm512_mask_storeu_ps(p, n.mask, v); }
STOKER_INLINE VF set_f(float x) { return _mm512_set1_ps(x); }
STOKER_INLINE VF fma(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
STOKER_INLINE V load_v(const uint8_t* p) { return _mm512_load_si512(p); }
STOKER_INLINE void store_v(uint8_t* p, V v) { _mm512_store_si512(p, v); }

// sum[m][t] += sum over a group of u * a, for kSub registers of rows and kCount tokens.
// weights(m, j) gives register j of subtile m, acts(t) the address of token t's activations.
template <int kGroup, int kMax, int kSub, int kCount, class Weights, class Acts>
STOKER_INLINE void dot_group(const Weights& weights, const Acts& acts, V (&sum)[kSub][kCount]) {
#pragma GCC unroll 8
  for (int j = 0; j < kGroup / 4; ++j) {
    V w[kSub];
#pragma GCC unroll 2
    for (int m = 0; m < kSub; ++m) w[m] = weights(m, j);
#pragma GCC unroll 8
    for (int t = 0; t < kCount; ++t) {
      const V a = _mm512_set1_epi32(load_int32(acts(t) + 4 * j));
#pragma GCC unroll 2
      for (int m = 0; m < kSub; ++m) sum[m][t] = _mm512_dpbusd_epi32(sum[m][t], w[m], a);
    }
  }
}
