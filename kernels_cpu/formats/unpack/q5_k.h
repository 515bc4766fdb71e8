// The unpacker of Q5_K (see tile_matmul.h); tile_x86.h and tile_arm64.h include this.
struct Unpack {
  static constexpr int kUnit = 256, kUnitBytes = 176, kGroup = 32, kZero = 0, kMax = 31;
  static constexpr bool kOffset = true;

  // Returns bit g of every byte of h as bit 4; the other bits are arbitrary.
  template <int g>
  static STOKER_INLINE V to_bit4(V h) {
    if constexpr (g < 4) return shift_left<4 - g>(h);
    if constexpr (g > 4) return shift_right<g - 4>(h);
    return h;
  }
  // Groups 2i and 2i + 1 are the low and the high nibbles of 32 bytes, and two bits of h[0..7].
  template <int i, class Sink>
  static STOKER_INLINE void pair(const Rows& rows, const ScaleMin6& head, const V* h, Sink& sink) {
    const V low = set8(15), bit4 = set8(16);
    V n[8], q[8];
    load_columns(rows, 48 + 32 * i, n);
    load_columns(rows, 64 + 32 * i, n + 4);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) q[j] = and_or(to_bit4<2 * i>(h[j]), bit4, bit_and(n[j], low));
    sink.template group<2 * i>(q, head.s<2 * i>(), head.m<2 * i>());
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      q[j] = and_or(to_bit4<2 * i + 1>(h[j]), bit4, high_nibbles(n[j]));
    }
    sink.template group<2 * i + 1>(q, head.s<2 * i + 1>(), head.m<2 * i + 1>());
  }
  template <class Sink>
  static STOKER_INLINE void unpack(const Rows& rows, Sink& sink) {
    const ScaleMin6 head(rows);
    V h[8];
    load_columns(rows, 16, h);
    load_columns(rows, 32, h + 4);
    pair<0>(rows, head, h, sink);
    pair<1>(rows, head, h, sink);
    pair<2>(rows, head, h, sink);
    pair<3>(rows, head, h, sink);
  }
};
