// Small Q8_0 matrices that predictors multiply with, on one thread, through the kernel table.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels_cpu/kernel.h"
#include "offload/predict/state.h"

namespace stoker {

// Rows of activations in int8, at most kBatch at once.
class MapInput {
 public:
  static constexpr int64_t kBatch = 32;
  explicit MapInput(int64_t cols = 32);
  // Takes x [n][cols], n <= kBatch. A row with a NaN gives NaN.
  void set(const float* x, int64_t n);

 private:
  friend class Map;
  struct alignas(64) Line {
    int8_t q[64];
  };
  int64_t cols_, lines_;  // lines_: lines of a row
  int64_t n_ = 0;
  std::vector<Line> q_;         // [kBatch][lines_]
  std::vector<float> scale_;    // [kBatch][cols / 32]
  std::vector<int32_t> sum16_;  // [kBatch][cols / 16]
  std::vector<Line> scratch_;
};

class Map {
 public:
  // Reads rows x cols weights in Q8_0 from the state; cols is a multiple of 32.
  void load(StateReader& state, int64_t rows, int64_t cols);
  void save(StateWriter& state) const { state.bytes(w_.data(), w_.size()); }
  explicit operator bool() const { return !w_.empty(); }
  // Sets y[i * y_stride + r] = row (row_begin + r) of the map times the input's row i, for `rows`
  // rows.
  void multiply(MapInput& x, int64_t row_begin, int64_t rows, float* y, int64_t y_stride) const;
  // Adds a row of the map, [cols], to y.
  void add_row(int64_t row, std::vector<float>& buffer, float* y) const;
  int64_t rows() const { return rows_; }

 private:
  int64_t rows_ = 0, cols_ = 0, row_bytes_ = 0;
  std::vector<uint8_t> w_;  // [rows][row_bytes]
};

// Sets out = x / rms(x) * factor, [n].
void scale_to_unit(const float* x, const float* factor, int64_t n, float* out);

// Rounds cols up to the multiple that a map needs.
inline int64_t map_cols(int64_t cols) { return (cols + 31) / 32 * 32; }

}  // namespace stoker
