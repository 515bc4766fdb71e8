// The unpacker of Q3_K (see tile_matmul.h); tile_x86.h and tile_arm64.h include this.
struct Unpack {
  static constexpr int kUnit = 256, kUnitBytes = 110, kGroup = 16, kZero = 4, kMax = 7;
  static constexpr bool kOffset = false;

  // Returns bit i of every byte of h as bit 2; the other bits are arbitrary.
  template <int i>
  static STOKER_INLINE V to_bit2(V h) {
    if constexpr (i < 2) return shift_left<2 - i>(h);
    if constexpr (i > 2) return shift_right<i - 2>(h);
    return h;
  }
  // Group g has 16 weights: bits 2c, 2c + 1 of n[0..3] (c = g % 8 / 2) below bit g / 2 of
  // mask[0..3].
  template <int g, class Sink>
  static STOKER_INLINE void column(const V* n, const V* mask, VF d, const V* scales, Sink& sink) {
    const V two = set8(3), bit2 = set8(4);
    V q[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const V low = bit_and(shift_right<2 * (g % 8 / 2)>(n[j]), two);
      q[j] = and_or(to_bit2<g / 2>(mask[j]), bit2, low);
    }
    const V sc = sub32(byte<g % 4>(scales[g / 4]), set32(32));
    sink.template group<g>(q, mul(d, to_float(sc)), zero_f());
  }
  template <int h, class Sink>
  static STOKER_INLINE void half(const Rows& rows, const V* mask, VF d, const V* scales,
                                 Sink& sink) {
    V n[8];
    load_columns(rows, 32 + 32 * h, n);
    load_columns(rows, 48 + 32 * h, n + 4);
    column<8 * h>(n, mask, d, scales, sink);
    column<8 * h + 1>(n + 4, mask + 4, d, scales, sink);
    column<8 * h + 2>(n, mask, d, scales, sink);
    column<8 * h + 3>(n + 4, mask + 4, d, scales, sink);
    column<8 * h + 4>(n, mask, d, scales, sink);
    column<8 * h + 5>(n + 4, mask + 4, d, scales, sink);
    column<8 * h + 6>(n, mask, d, scales, sink);
    column<8 * h + 7>(n + 4, mask + 4, d, scales, sink);
  }
  template <class Sink>
  static STOKER_INLINE void unpack(const Rows& rows, Sink& sink) {
    V p[4];  // the last 4 bytes of qs, then the 12 bytes of scales
    load_columns(rows, 92, p, 4);
    const V four = set8(15), upper = set8(48);
    V scales[4];
    scales[0] = and_or(shift_left<4>(p[3]), upper, bit_and(p[1], four));
    scales[1] = and_or(shift_left<2>(p[3]), upper, bit_and(p[2], four));
    scales[2] = and_or(p[3], upper, high_nibbles(p[1]));
    scales[3] = and_or(shift_right<2>(p[3]), upper, high_nibbles(p[2]));
    const VF d = load_f16(rows, 108);
    V mask[8];
    load_columns(rows, 0, mask);
    load_columns(rows, 16, mask + 4);
    half<0>(rows, mask, d, scales, sink);
    half<1>(rows, mask, d, scales, sink);
  }
};
