// The unpacker of Q4_1 (see tile_matmul.h); tile_x86.h and tile_arm64.h include this.
struct Unpack {
  static constexpr int kUnit = 32, kUnitBytes = 20, kGroup = 32, kZero = 0, kMax = 15;
  static constexpr bool kOffset = true;

  template <class Sink>
  static STOKER_INLINE void unpack(const Rows& rows, Sink& sink) {
    const V dm = load_words(rows, 0);
    V n[4], q[8];
    load_columns(rows, 4, n);
    split_nibbles(n, q);
    sink.template group<0>(q, low_f16(dm), high_f16(dm));
  }
};
