// The unpacker of Q5_1 (see tile_matmul.h); tile_x86.h and tile_arm64.h include this.
struct Unpack {
  static constexpr int kUnit = 32, kUnitBytes = 24, kGroup = 32, kZero = 0, kMax = 31;
  static constexpr bool kOffset = true;

  template <class Sink>
  static STOKER_INLINE void unpack(const Rows& rows, Sink& sink) {
    V head[4], n[4], q[8];
    load_columns(rows, 0, head);  // d and m, qh, ...
    load_columns(rows, 8, n, 8);
    split_five_bits(n, head[1], q);
    sink.template group<0>(q, low_f16(head[0]), high_f16(head[0]));
  }
};
