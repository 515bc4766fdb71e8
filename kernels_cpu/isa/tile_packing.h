// The bit packings that several formats share (see formats/packing.h), unpacked in registers.
// tile_x86.h and tile_arm64.h include this once per instruction set.

// Sets q[0..3] to the low nibbles of n[0..3], weights 0..15, and q[4..7] to the high ones, weights
// 16..31.
STOKER_INLINE void split_nibbles(const V* n, V* q) {
  const V low = set8(15);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    q[j] = bit_and(n[j], low);
    q[4 + j] = high_nibbles(n[j]);
  }
}

// Does split_nibbles, with bit j of the word `high` as bit 4 of weight j.
STOKER_INLINE void split_five_bits(const V* n, V high, V* q) {
  const V bit4 = set8(16);
  split_nibbles(n, q);
  q[0] = and_or(bits_to_bit4<0>(high), bit4, q[0]);
  q[1] = and_or(bits_to_bit4<1>(high), bit4, q[1]);
  q[2] = and_or(bits_to_bit4<2>(high), bit4, q[2]);
  q[3] = and_or(bits_to_bit4<3>(high), bit4, q[3]);
  q[4] = and_or(bits_to_bit4<4>(high), bit4, q[4]);
  q[5] = and_or(bits_to_bit4<5>(high), bit4, q[5]);
  q[6] = and_or(bits_to_bit4<6>(high), bit4, q[6]);
  q[7] = and_or(bits_to_bit4<7>(high), bit4, q[7]);
}

// Does split_nibbles, and looks the nibbles up in a table of 16 bytes.
STOKER_INLINE void look_up_nibbles(const V* n, V table, V* q) {
  split_nibbles(n, q);
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) q[j] = lookup(table, q[j]);
}

// The head of Q4_K and Q5_K: f16 d, f16 dmin, and eight 6-bit scales and minima.
struct ScaleMin6 {
  VF d, dmin;
  V scale[2], min[2];  // byte g % 4 of [g / 4]

  STOKER_INLINE explicit ScaleMin6(const Rows& rows) {
    V head[4];
    load_columns(rows, 0, head);
    const V six = set8(63), four = set8(15), upper = set8(48);
    d = low_f16(head[0]);
    dmin = high_f16(head[0]);
    scale[0] = bit_and(head[1], six);
    min[0] = bit_and(head[2], six);
    scale[1] = and_or(shift_right<2>(head[1]), upper, bit_and(head[3], four));
    min[1] = and_or(shift_right<2>(head[2]), upper, high_nibbles(head[3]));
  }
  template <int g>
  STOKER_INLINE VF s() const {
    return mul(d, to_float(byte<g % 4>(scale[g / 4])));
  }
  template <int g>
  STOKER_INLINE VF m() const {
    return negate(mul(dmin, to_float(byte<g % 4>(min[g / 4]))));
  }
};

inline constexpr int8_t kIq4Unsigned[16] = {
    // kIq4Codes + 128
    1, 24, 45, 63, 79, 93, 106, 118, -127, -115, -103, -90, -75, -59, -39, -15};
