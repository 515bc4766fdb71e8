// The unpacker of MXFP4 (see tile_matmul.h); tile_x86.h and tile_arm64.h include this.
inline constexpr int8_t kDoubledUnsigned[16] = {
    // kDoubled + 12
    12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

struct Unpack {
  static constexpr int kUnit = 32, kUnitBytes = 17, kGroup = 32, kZero = 12, kMax = 24;
  static constexpr bool kOffset = false;

  template <class Sink>
  static STOKER_INLINE void unpack(const Rows& rows, Sink& sink) {
    V n[4], q[8];
    load_columns(rows, 1, n);
    look_up_nibbles(n, table16(kDoubledUnsigned), q);
    // The scale 2^(e - 128) has exponent e - 1 where that is positive, else it is one of the
    // subnormals 2^-128 (e = 0) and 2^-127 (e = 1), whose bit patterns are below those of all
    // others.
    const V e = load_bytes(rows, 0), one = set32(1);
    const V normal = shift_left<23>(sub32(e, one));
    const V subnormal = add32(shift_left<21>(bit_and(e, one)), set32(0x00200000));
    sink.template group<0>(q, as_float(max32(normal, subnormal)), zero_f());
  }
};
