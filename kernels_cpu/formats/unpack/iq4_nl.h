// The unpacker of IQ4_NL (see tile_matmul.h); tile_x86.h and tile_arm64.h include this.
struct Unpack {
  static constexpr int kUnit = 32, kUnitBytes = 18, kGroup = 32, kZero = 128, kMax = 255;
  static constexpr bool kOffset = false;

  template <class Sink>
  static STOKER_INLINE void unpack(const Rows& rows, Sink& sink) {
    V n[4], q[8];
    load_columns(rows, 2, n);
    look_up_nibbles(n, table16(kIq4Unsigned), q);
    sink.template group<0>(q, load_f16(rows, 0), zero_f());
  }
};
