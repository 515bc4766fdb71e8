// The unpacker of Q5_0 (see tile_matmul.h); tile_x86.h and tile_arm64.h include this.
struct Unpack {
  static constexpr int kUnit = 32, kUnitBytes = 22, kGroup = 32, kZero = 16, kMax = 31;
  static constexpr bool kOffset = false;

  template <class Sink>
  static STOKER_INLINE void unpack(const Rows& rows, Sink& sink) {
    V head[4], n[4], q[8];
    load_columns(rows, 0, head);  // d and the low half of qh, the high half of qh, ...
    const V high = bit_or(shift_right<16>(head[0]), shift_left<16>(head[1]));
    load_columns(rows, 6, n, 10);
    split_five_bits(n, high, q);
    sink.template group<0>(q, low_f16(head[0]), zero_f());
  }
};
