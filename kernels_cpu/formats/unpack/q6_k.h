// The unpacker of Q6_K (see tile_matmul.h); tile_x86.h and tile_arm64.h include this.
struct Unpack {
  static constexpr int kUnit = 256, kUnitBytes = 210, kGroup = 16, kZero = 32, kMax = 63;
  static constexpr bool kOffset = false;

  // Group g has 16 weights of column c of a half: nibble c / 2 of low[0..3] and bits 2c, 2c + 1 of
  // high[0..3].
  template <int g, class Sink>
  static STOKER_INLINE void column(const V* low, const V* high, VF d, const V* scales, Sink& sink) {
    constexpr int c = g % 8 / 2;
    const V four = set8(15), upper = set8(48);
    V q[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const V bits = c == 0   ? shift_left<4>(high[j])
                     : c == 1 ? shift_left<2>(high[j])
                     : c == 2 ? high[j]
                              : shift_right<2>(high[j]);
      q[j] = and_or(bits, upper, c < 2 ? bit_and(low[j], four) : high_nibbles(low[j]));
    }
    sink.template group<g>(q, mul(d, to_float(signed_byte<g % 4>(scales[g / 4]))), zero_f());
  }
  template <int h, class Sink>
  static STOKER_INLINE void half(const Rows& rows, VF d, const V* scales, Sink& sink) {
    V even[8], odd[8], high[8];  // nibbles of columns 0 and 2, of columns 1 and 3, upper bits
    load_columns(rows, 128 + 32 * h, high);
    load_columns(rows, 144 + 32 * h, high + 4);
    load_columns(rows, 64 * h, even);
    load_columns(rows, 64 * h + 16, even + 4);
    column<8 * h>(even, high, d, scales, sink);
    column<8 * h + 1>(even + 4, high + 4, d, scales, sink);
    load_columns(rows, 64 * h + 32, odd);
    load_columns(rows, 64 * h + 48, odd + 4);
    column<8 * h + 2>(odd, high, d, scales, sink);
    column<8 * h + 3>(odd + 4, high + 4, d, scales, sink);
    column<8 * h + 4>(even, high, d, scales, sink);
    column<8 * h + 5>(even + 4, high + 4, d, scales, sink);
    column<8 * h + 6>(odd, high, d, scales, sink);
    column<8 * h + 7>(odd + 4, high + 4, d, scales, sink);
  }
  template <class Sink>
  static STOKER_INLINE void unpack(const Rows& rows, Sink& sink) {
    V scales[4];
    load_columns(rows, 192, scales);
    const VF d = load_f16(rows, 208);
    half<0>(rows, d, scales, sink);
    half<1>(rows, d, scales, sink);
  }
};
