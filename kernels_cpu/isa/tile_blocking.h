// The block sizes of a matmul of many tokens, and the scratch that it takes. The sizes keep the
// packed tokens and the unpacked panel of one block in a second-level cache of 512 KiB to 1 MiB.
#pragma once

#include <cstddef>
#include <cstdint>

namespace stoker {

inline constexpr int64_t kBlockCols = 1024;   // a multiple of 256, the longest block of a format
inline constexpr int64_t kBlockTokens = 192;  // tokens packed at a time
inline constexpr int64_t kPanelRows = 32;     // rows unpacked at a time
inline constexpr int64_t kRowsAtOnce = 16;    // rows of the widest tile (kRows of tile_avx512.h)

inline int64_t round_up_64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Returns the bytes of packed activations: int8 values, a scale per 32 and up to two sums per 32.
inline int64_t packed_tokens_bytes(int64_t cols) {
  return round_up_64((cols < kBlockCols ? cols : kBlockCols) / 32 * kBlockTokens * (32 + 4 + 8));
}
// Returns the bytes of a panel: one byte a weight, a scale and an offset per group of 16.
inline int64_t panel_bytes(int64_t cols) {
  return round_up_64((cols < kBlockCols ? cols : kBlockCols) * kPanelRows * 3 / 2);
}
// Returns the bytes of a copy of fewer rows than a tile has (34 bytes per 32 weights: Q8_0).
inline int64_t short_matrix_bytes(int64_t cols) {
  return round_up_64(kRowsAtOnce * (cols / 32) * 34);
}

}  // namespace stoker
