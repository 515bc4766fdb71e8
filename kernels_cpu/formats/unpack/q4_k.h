// The unpacker of Q4_K (see tile_matmul.h); tile_x86.h and tile_arm64.h include this.
struct Unpack {
  static constexpr int kUnit = 256, kUnitBytes = 144, kGroup = 32, kZero = 0, kMax = 15;
  static constexpr bool kOffset = true;

  // Groups 2i and 2i + 1 are the low and the high nibbles of 32 bytes.
  template <int i, class Sink>
  static STOKER_INLINE void pair(const Rows& rows, const ScaleMin6& head, Sink& sink) {
    const V low = set8(15);
    V n[8], q[8];
    load_columns(rows, 16 + 32 * i, n);
    load_columns(rows, 32 + 32 * i, n + 4);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) q[j] = bit_and(n[j], low);
    sink.template group<2 * i>(q, head.s<2 * i>(), head.m<2 * i>());
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) q[j] = high_nibbles(n[j]);
    sink.template group<2 * i + 1>(q, head.s<2 * i + 1>(), head.m<2 * i + 1>());
  }
  template <class Sink>
  static STOKER_INLINE void unpack(const Rows& rows, Sink& sink) {
    const ScaleMin6 head(rows);
    pair<0>(rows, head, sink);
    pair<1>(rows, head, sink);
    pair<2>(rows, head, sink);
    pair<3>(rows, head, sink);
  }
};
