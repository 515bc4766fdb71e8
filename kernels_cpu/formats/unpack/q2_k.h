// The unpacker of Q2_K (see tile_matmul.h); tile_x86.h and tile_arm64.h include this.
struct Unpack {
  static constexpr int kUnit = 256, kUnitBytes = 84, kGroup = 16, kZero = 0, kMax = 3;
  static constexpr bool kOffset = true;

  struct Head {
    VF d, dmin;
    V scales[4];  // byte g % 4 of [g / 4]: sc in the low nibble, mn in the high one
  };
  // Group g has 16 weights of 2 bits: pair g % 8 / 2 of every byte of n[0..3].
  template <int g, class Sink>
  static STOKER_INLINE void column(const V* n, const Head& head, Sink& sink) {
    const V two = set8(3), four = set32(15);
    V q[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) q[j] = bit_and(shift_right<2 * (g % 8 / 2)>(n[j]), two);
    const V both = head.scales[g / 4];
    const V sc = bit_and(shift_right<8 * (g % 4)>(both), four);
    const V mn = bit_and(shift_right<8 * (g % 4) + 4>(both), four);
    sink.template group<g>(q, mul(head.d, to_float(sc)), negate(mul(head.dmin, to_float(mn))));
  }
  template <int h, class Sink>
  static STOKER_INLINE void half(const Rows& rows, const Head& head, Sink& sink) {
    V n[8];
    load_columns(rows, 16 + 32 * h, n);
    load_columns(rows, 32 + 32 * h, n + 4);
    column<8 * h>(n, head, sink);
    column<8 * h + 1>(n + 4, head, sink);
    column<8 * h + 2>(n, head, sink);
    column<8 * h + 3>(n + 4, head, sink);
    column<8 * h + 4>(n, head, sink);
    column<8 * h + 5>(n + 4, head, sink);
    column<8 * h + 6>(n, head, sink);
    column<8 * h + 7>(n + 4, head, sink);
  }
  template <class Sink>
  static STOKER_INLINE void unpack(const Rows& rows, Sink& sink) {
    Head head;
    load_columns(rows, 0, head.scales);
    const V d = load_words(rows, 80);
    head.d = low_f16(d);
    head.dmin = high_f16(d);
    half<0>(rows, head, sink);
    half<1>(rows, head, sink);
  }
};
