// Q4_0 unpacked: see tile_matmul.h. Included by tile_x86.h.
struct Unpack {
  static constexpr int kUnit = 32, kUnitBytes = 18, kGroup = 32, kZero = 8, kMax = 15;
  static constexpr bool kOffset = false;

  template <class Sink>
  static STOKER_INLINE void unpack(const Rows& rows, Sink& sink) {
    const V low = set8(15);
    V n[4], q[8];
    load_columns(rows, 2, n);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      q[j] = bit_and(n[j], low);
      q[4 + j] = bit_and(shift_right<4>(n[j]), low);
    }
    sink.template group<0>(q, load_f16(rows, 0), zero_f());
  }
};
