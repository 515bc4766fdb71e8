// The unpacker of IQ4_XS (see tile_matmul.h); tile_x86.h and tile_arm64.h include this.
struct Unpack {
  static constexpr int kUnit = 256, kUnitBytes = 136, kGroup = 32, kZero = 128, kMax = 255;
  static constexpr bool kOffset = false;

  // head[0] holds d and the upper bits of the 6-bit scales, 2 a group; head[1] the
  // lower ones, 4 a group.
  template <int g, class Sink>
  static STOKER_INLINE void block(const Rows& rows, VF d, const V* head, Sink& sink) {
    V n[4], q[8];
    load_columns(rows, 8 + 16 * g, n, g == 0 ? 8 : 0);
    look_up_nibbles(n, table16(kIq4Unsigned), q);
    const V low = bit_and(shift_right<4 * g>(head[1]), set32(15));
    const V sc = and_or(shift_right<12 + 2 * g>(head[0]), set32(48), low);
    sink.template group<g>(q, mul(d, to_float(sub32(sc, set32(32)))), zero_f());
  }
  template <class Sink>
  static STOKER_INLINE void unpack(const Rows& rows, Sink& sink) {
    V head[4];
    load_columns(rows, 0, head);
    const VF d = low_f16(head[0]);
    block<0>(rows, d, head, sink);
    block<1>(rows, d, head, sink);
    block<2>(rows, d, head, sink);
    block<3>(rows, d, head, sink);
    block<4>(rows, d, head, sink);
    block<5>(rows, d, head, sink);
    block<6>(rows, d, head, sink);
    block<7>(rows, d, head, sink);
  }
};
