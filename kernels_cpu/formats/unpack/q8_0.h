// The unpacker of Q8_0 (see tile_matmul.h); tile_x86.h and tile_arm64.h include this.
struct Unpack {
  static constexpr int kUnit = 32, kUnitBytes = 34, kGroup = 32, kZero = 128, kMax = 255;
  static constexpr bool kOffset = false;

  template <class Sink>
  static STOKER_INLINE void unpack(const Rows& rows, Sink& sink) {
    const V top = set8(0x80);
    V q[8];
    load_columns(rows, 2, q);
    load_columns(rows, 18, q + 4);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) q[j] = bit_xor(q[j], top);
    sink.template group<0>(q, load_f16(rows, 0), zero_f());
  }
};
