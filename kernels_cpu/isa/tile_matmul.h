// The matmul of the x86 and arm64 instruction sets, over the vector operations of tile_avx512.h,
// tile_avx2.h or tile_neon.h. tile_x86.h and tile_arm64.h include this once per instruction set,
// inside its namespace and target region.
//
// An unpacker is a struct of formats/unpack/<format>.h:
//   kUnit, kUnitBytes   weights and bytes of one unit: a block, or a few
//   kGroup, kZero       weights of a group (16 or 32); u = q + kZero is unsigned, at most kMax
//   kOffset             true where the format has an offset m
//   unpack(rows, sink)  gives the unit's groups i = 0, 1, ... in order to
//                       sink.template group<i>(q, s, m): q[kGroup / 4] registers of u, s and m the
//                       scale and offset of every row (m is ignored without kOffset)

template <class U>
struct Traits {
  static constexpr bool kSigned = kSignedWeights<U::kMax>;
  static_assert(!kSigned || U::kZero == 128, "u becomes q by flipping its top bit");
  // Sums of u * a begin at -zero point * sum of a, which makes them sums of q * a.
  static constexpr int kZero = kSigned ? 0 : U::kZero;
};

// ---- few tokens: registers are consumed as they are unpacked ----

struct RegisterWeights {
  const V* q;
  bool flip;
  STOKER_INLINE V operator()(int, int j) const { return flip ? bit_xor(q[j], set8(0x80)) : q[j]; }
};
template <int kCount>
struct TokenPointers {
  const int8_t* const* a;
  int64_t at;
  STOKER_INLINE const int8_t* operator()(int t) const { return a[t] + at; }
};

template <class U, int kCount>
struct Accumulate {
  const int8_t* a[kCount];       // at the unit's first weight
  const float* scale[kCount];    // at the unit's first 32
  const int32_t* sum16[kCount];  // at the unit's first 16
  VF acc[kCount];

  template <int i>
  STOKER_INLINE void group(const V* q, VF s, [[maybe_unused]] VF m) {
    constexpr int kGroup = U::kGroup;
    V sum[1][kCount];
    int32_t a_sum[kCount];
#pragma GCC unroll 8
    for (int t = 0; t < kCount; ++t) {
      if constexpr (U::kOffset || Traits<U>::kZero != 0) {
        a_sum[t] = kGroup == 16 ? sum16[t][i] : sum16[t][2 * i] + sum16[t][2 * i + 1];
      }
      sum[0][t] =
          set32(Traits<U>::kZero == 0 ? 0u : static_cast<uint32_t>(-Traits<U>::kZero * a_sum[t]));
    }
    dot_group<kGroup, U::kMax, 1, kCount>(RegisterWeights{q, Traits<U>::kSigned},
                                          TokenPointers<kCount>{a, i * kGroup}, sum);
#pragma GCC unroll 8
    for (int t = 0; t < kCount; ++t) {
      const float f = scale[t][i * kGroup / 32];
      acc[t] = fma(to_float(sum[0][t]), mul(s, set_f(f)), acc[t]);
      if constexpr (U::kOffset) {
        acc[t] = fma(m, set_f(f * static_cast<float>(a_sum[t])), acc[t]);
      }
    }
  }
  STOKER_INLINE void advance(int weights) {
#pragma GCC unroll 8
    for (int t = 0; t < kCount; ++t) {
      a[t] += weights;
      scale[t] += weights / 32;
      sum16[t] += weights / 16;
    }
  }
};

// The tile that covers rows from `row` on: its first row, and the lanes [low, high) that are new.
// The tile of the last rows begins earlier, so that no row beyond the last is read; only with
// fewer rows than a tile (copy_short) is high < kRows.
struct Tile {
  int64_t first, low, high;
  STOKER_INLINE Tile(int64_t row, int64_t row_end) {
    first = row + kRows <= row_end ? row : row_end < kRows ? 0 : row_end - kRows;
    low = row - first;
    high = row_end - first < kRows ? row_end - first : kRows;
  }
  STOKER_INLINE int64_t next_row() const { return first + high; }
};
STOKER_INLINE void store_rows(float* y, VF v, int64_t low, int64_t high) {
  if (low == 0 && high == kRows) {
    store_f(y, v);
  } else {
    store_f(y, v, Lanes(low, high));
  }
}

// The least bytes from the tile that is read to the tile that is prefetched: at 25 to 40 GB/s and a
// latency of 100 to 300 ns one tile of short rows is too little.
inline constexpr int64_t kAheadBytes = 12288;

template <class U, int kCount>
void matmul_few(const MatmulArgs& args) {
  const Activations& x = args.x;
  const int64_t units = x.cols / U::kUnit;
  const int64_t tile_bytes = kRows * args.row_bytes;
  const int64_t ahead = (kAheadBytes + tile_bytes - 1) / tile_bytes * tile_bytes;
  for (int64_t row = 0; row < args.row_end;) {
    const Tile tile(row, args.row_end);
    const uint8_t* w = args.w + tile.first * args.row_bytes;
    Rows rows(w, args.row_bytes, w + ahead, U::kUnitBytes);
    Accumulate<U, kCount> sink;
    for (int t = 0; t < kCount; ++t) {
      const int64_t token = args.token_list ? args.token_list[t] : t;
      sink.a[t] = x.q + token * x.q_stride;
      sink.scale[t] = x.scale + token * (x.cols / 32);
      sink.sum16[t] = x.sum16 + token * (x.cols / 16);
      sink.acc[t] = zero_f();
    }
    for (int64_t u = 0; u < units; ++u) {
      U::unpack(rows, sink);
      rows.advance();
      sink.advance(U::kUnit);
    }
    for (int t = 0; t < kCount; ++t) {
      store_rows(args.y + t * args.y_stride + tile.first, sink.acc[t], tile.low, tile.high);
    }
    row = tile.next_row();
  }
}

// ---- many tokens: rows are unpacked to a panel, tokens packed, and multiplied tile by tile ----

// The panel holds, per group, per subtile: kGroup / 4 registers of weights; scales and offsets
// likewise [group][subtile][kRows].
template <class U>
struct Panel {
  uint8_t* q;
  float* s;
  float* m;

  template <int i>
  STOKER_INLINE void group(const V* regs, VF scale, [[maybe_unused]] VF offset) {
    constexpr int kRegs = U::kGroup / 4;
#pragma GCC unroll 8
    for (int j = 0; j < kRegs; ++j) {
      const V u = Traits<U>::kSigned ? bit_xor(regs[j], set8(0x80)) : regs[j];
      store_v(q + (i * kSubtiles * kRegs + j) * static_cast<int>(sizeof(V)), u);
    }
    store_f(s + i * kSubtiles * kRows, scale);
    if constexpr (U::kOffset) store_f(m + i * kSubtiles * kRows, offset);
  }
  STOKER_INLINE void advance() {
    constexpr int kGroups = U::kUnit / U::kGroup;
    q += kGroups * kSubtiles * (U::kGroup / 4) * static_cast<int>(sizeof(V));
    s += kGroups * kSubtiles * kRows;
    m += kGroups * kSubtiles * kRows;
  }
};

// A tile of n packed tokens holds, per 32 columns, int8 q[n][32] and float scale[n], then n words
// per group in the 32: int32 -zero * sum of q (with a zero point) or float scale * sum of q (with
// an offset).
inline constexpr int kPackedToken = 32 + 4 + 8;  // bytes of one token's 32 columns, at most

template <int kGroup, int kZero, bool kOffset>
void pack_tokens(const Activations& x, const int32_t* tokens, int64_t token_begin, int n,
                 int64_t col, int64_t cols, uint8_t* out) {
  for (int64_t k = col; k < col + cols; k += 32) {
    auto* scale = reinterpret_cast<float*>(out + 32 * n);
    uint8_t* extra = out + 36 * n;
    for (int t = 0; t < n; ++t) {
      const int64_t i = token_begin + t;
      const int64_t token = tokens ? tokens[i] : i;
      std::memcpy(out + 32 * t, x.q + token * x.q_stride + k, 32);
      scale[t] = x.scale[token * (x.cols / 32) + k / 32];
      const int32_t* sum16 = x.sum16 + token * (x.cols / 16) + k / 16;
      for (int g = 0; g < 32 / kGroup; ++g) {
        const int32_t sum = kGroup == 16 ? sum16[g] : sum16[0] + sum16[1];
        if constexpr (kOffset) {
          reinterpret_cast<float*>(extra)[g * n + t] = scale[t] * static_cast<float>(sum);
        } else {
          reinterpret_cast<int32_t*>(extra)[g * n + t] = -kZero * sum;
        }
      }
    }
    out += n * kPackedToken;
  }
}

template <int kGroup>
struct PanelWeights {
  const uint8_t* q;
  STOKER_INLINE V operator()(int m, int j) const {
    return load_v(q + (m * (kGroup / 4) + j) * static_cast<int>(sizeof(V)));
  }
};
struct PackedActs {
  const uint8_t* a;
  STOKER_INLINE const uint8_t* operator()(int t) const { return a + 32 * t; }
};

// The destination of a tile of kSub x kRows rows by kCount tokens: rows first[i] + lane for the
// lanes [low[i], high[i]) of subtile i.
struct Target {
  float* y;
  int64_t y_stride;
  int64_t first[kSubtiles];
  int64_t low[kSubtiles], high[kSubtiles];
  bool resume;  // continue from y instead of 0
};

template <int kGroup, int kZero, bool kOffset, int kMax, int kSub, int kCount>
void micro(const uint8_t* q, const float* s, const float* m, const uint8_t* acts, int64_t cols,
           const Target& to) {
  VF acc[kSub][kCount];
#pragma GCC unroll 8
  for (int t = 0; t < kCount; ++t) {
#pragma GCC unroll 2
    for (int i = 0; i < kSub; ++i) {
      acc[i][t] = to.resume
                      ? load_f(to.y + t * to.y_stride + to.first[i], Lanes(to.low[i], to.high[i]))
                      : zero_f();
    }
  }
  for (int64_t k = 0; k < cols; k += 32) {
    const auto* scale = reinterpret_cast<const float*>(acts + 32 * kCount);
    const uint8_t* extra = acts + 36 * kCount;
#pragma GCC unroll 2
    for (int g = 0; g < 32 / kGroup; ++g) {
      V sum[kSub][kCount];
#pragma GCC unroll 8
      for (int t = 0; t < kCount; ++t) {
#pragma GCC unroll 2
        for (int i = 0; i < kSub; ++i) {
          sum[i][t] = set32(kZero == 0 || kOffset
                                ? 0u
                                : static_cast<uint32_t>(load_int32(extra + 4 * (g * kCount + t))));
        }
      }
      dot_group<kGroup, kMax, kSub, kCount>(PanelWeights<kGroup>{q}, PackedActs{acts + g * kGroup},
                                            sum);
      VF row_scale[kSub];
      [[maybe_unused]] VF row_offset[kSub];
#pragma GCC unroll 2
      for (int i = 0; i < kSub; ++i) {
        row_scale[i] = load_f(s + i * kRows);
        if constexpr (kOffset) row_offset[i] = load_f(m + i * kRows);
      }
#pragma GCC unroll 8
      for (int t = 0; t < kCount; ++t) {
        const VF f = set_f(scale[t]);
#pragma GCC unroll 2
        for (int i = 0; i < kSub; ++i) {
          acc[i][t] = fma(to_float(sum[i][t]), mul(row_scale[i], f), acc[i][t]);
          if constexpr (kOffset) {
            const VF o = set_f(reinterpret_cast<const float*>(extra)[g * kCount + t]);
            acc[i][t] = fma(row_offset[i], o, acc[i][t]);
          }
        }
      }
      q += kSubtiles * (kGroup / 4) * static_cast<int>(sizeof(V));
      s += kSubtiles * kRows;
      m += kSubtiles * kRows;
    }
    acts += kCount * kPackedToken;
  }
#pragma GCC unroll 8
  for (int t = 0; t < kCount; ++t) {
#pragma GCC unroll 2
    for (int i = 0; i < kSub; ++i) {
      store_rows(to.y + t * to.y_stride + to.first[i], acc[i][t], to.low[i], to.high[i]);
    }
  }
}

using MicroFn = void (*)(const uint8_t*, const float*, const float*, const uint8_t*, int64_t,
                         const Target&);
template <int kGroup, int kZero, bool kOffset, int kMax, int kSub>
MicroFn micro_for(int tokens) {
  switch (tokens) {
    case 1:
      return micro<kGroup, kZero, kOffset, kMax, kSub, 1>;
    case 2:
      return micro<kGroup, kZero, kOffset, kMax, kSub, 2>;
    case 3:
      return micro<kGroup, kZero, kOffset, kMax, kSub, 3>;
    case 4:
      return micro<kGroup, kZero, kOffset, kMax, kSub, 4>;
  }
  if constexpr (kTokens > 4) {
    if (tokens == 5) return micro<kGroup, kZero, kOffset, kMax, kSub, 5>;
  }
  return micro<kGroup, kZero, kOffset, kMax, kSub, kTokens>;
}

template <class U>
void matmul_many(const MatmulArgs& args) {
  static_assert(kSubtiles * kRows <= kPanelRows && kBlockCols % U::kUnit == 0);
  constexpr int kGroup = U::kGroup, kZero = Traits<U>::kZero;
  // The micro-kernels depend only on whether there is a zero point, and on how large u gets:
  // formats that agree in this share them.
  constexpr int kMicroZero = kZero == 0 ? 0 : 1, kMicroMax = micro_max(U::kMax);
  const Activations& x = args.x;
  const int64_t block_cols = x.cols < kBlockCols ? x.cols : kBlockCols;
  uint8_t* packed = args.scratch;
  uint8_t* panel_q = packed + packed_tokens_bytes(x.cols);
  auto* panel_s = reinterpret_cast<float*>(panel_q + block_cols * kSubtiles * kRows);
  float* panel_m = panel_s + block_cols / kGroup * kSubtiles * kRows;
  for (int64_t token = 0; token < args.n_tokens; token += kBlockTokens) {
    const int64_t left = args.n_tokens - token;
    const int tokens = static_cast<int>(left < kBlockTokens ? left : kBlockTokens);
    for (int64_t col = 0; col < x.cols; col += kBlockCols) {
      const int64_t cols = x.cols - col < kBlockCols ? x.cols - col : kBlockCols;
      const int64_t packed_token = cols / 32 * kPackedToken;
      for (int t = 0; t < tokens; t += kTokens) {
        const int n = tokens - t < kTokens ? tokens - t : kTokens;
        pack_tokens<kGroup, kZero, U::kOffset>(x, args.token_list, token + t, n, col, cols,
                                               packed + t * packed_token);
      }
      for (int64_t row = 0; row < args.row_end;) {
        Target to;
        to.y_stride = args.y_stride;
        to.resume = col > 0;
        int subtiles = 0;
        while (subtiles < kSubtiles && row < args.row_end) {
          const Tile tile(row, args.row_end);
          const uint8_t* w = args.w + tile.first * args.row_bytes + col / U::kUnit * U::kUnitBytes;
          Rows rows(w, args.row_bytes, cols == x.cols ? w + kRows * args.row_bytes : w,
                    U::kUnitBytes);
          Panel<U> sink{panel_q + subtiles * (kGroup / 4) * static_cast<int>(sizeof(V)),
                        panel_s + subtiles * kRows, panel_m + subtiles * kRows};
          for (int64_t k = 0; k < cols; k += U::kUnit) {
            U::unpack(rows, sink);
            rows.advance();
            sink.advance();
          }
          to.first[subtiles] = tile.first;
          to.low[subtiles] = tile.low;
          to.high[subtiles] = tile.high;
          row = tile.next_row();
          ++subtiles;
        }
        for (int t = 0; t < tokens; t += kTokens) {
          const int n = tokens - t < kTokens ? tokens - t : kTokens;
          to.y = args.y + (token + t) * args.y_stride;
          const MicroFn f =
              subtiles == 1 ? micro_for<kGroup, kMicroZero, U::kOffset, kMicroMax, 1>(n)
                            : micro_for<kGroup, kMicroZero, U::kOffset, kMicroMax, kSubtiles>(n);
          f(panel_q, panel_s, panel_m, packed + t * packed_token, cols, to);
        }
      }
    }
  }
}

// Copies the rows of a matrix with fewer rows than a tile to scratch, the last one repeated.
STOKER_INLINE void copy_short(MatmulArgs* args) {
  uint8_t* copy = args->scratch;
  for (int64_t r = 0; r < kRows; ++r) {
    const int64_t from = r < args->row_end ? r : args->row_end - 1;
    std::memcpy(copy + r * args->row_bytes, args->w + from * args->row_bytes,
                static_cast<size_t>(args->row_bytes));
  }
  args->w = copy;
  args->scratch += short_matrix_bytes(args->x.cols);
}

template <class U>
void matmul(const MatmulArgs& given) {
  MatmulArgs args = given;
  if (args.row_begin >= args.row_end || args.n_tokens <= 0) return;
  // From here on the given rows are the whole matrix, because others may not be readable.
  args.w += args.row_begin * args.row_bytes;
  args.y += args.row_begin;
  args.row_end -= args.row_begin;
  args.row_begin = 0;
  if (args.row_end < kRows) copy_short(&args);
  if (args.n_tokens == 1) return matmul_few<U, 1>(args);
  if (args.n_tokens == 2) return matmul_few<U, 2>(args);
  if constexpr (kFewTokens == 4) {
    if (args.n_tokens == 3) return matmul_few<U, 3>(args);
    if (args.n_tokens == 4) return matmul_few<U, 4>(args);
  }
  matmul_many<U>(args);
}
