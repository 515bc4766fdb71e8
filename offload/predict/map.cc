#include "offload/predict/map.h"

#include <cmath>

namespace stoker {

namespace {

const Format& q8_0() {
  static const Format& format = *find_format(FormatId::Q8_0);
  return format;
}

}  // namespace

MapInput::MapInput(int64_t cols)
    : cols_(cols),
      lines_((cols + 63) / 64),
      q_(static_cast<size_t>(kBatch * lines_)),
      scale_(static_cast<size_t>(kBatch * cols / 32)),
      sum16_(static_cast<size_t>(kBatch * cols / 16)),
      scratch_(matmul_scratch_bytes(cols) / sizeof(Line) + 1) {}

void MapInput::set(const float* x, int64_t n) {
  static const QuantizeActFn quantize = quantize_act_kernel(active_isa());
  n_ = n;
  for (int64_t i = 0; i < n; ++i) {
    quantize(x + i * cols_, cols_, q_[static_cast<size_t>(i * lines_)].q,
             scale_.data() + i * (cols_ / 32), sum16_.data() + i * (cols_ / 16));
  }
}

void Map::load(StateReader& state, int64_t rows, int64_t cols) {
  rows_ = rows;
  cols_ = cols;
  row_bytes_ = stoker::row_bytes(q8_0(), cols);
  const std::string_view bytes = state.bytes(static_cast<size_t>(rows * row_bytes_));
  w_.assign(bytes.begin(), bytes.end());
}

void Map::multiply(MapInput& x, int64_t row_begin, int64_t rows, float* y, int64_t y_stride) const {
  static const MatmulFn matmul = matmul_kernel(q8_0(), active_isa());
  MatmulArgs args;
  args.w = w_.data() + row_begin * row_bytes_;
  args.row_bytes = row_bytes_;
  args.row_end = rows;
  args.x.kind = ActKind::i8;
  args.x.tokens = x.n_;
  args.x.cols = cols_;
  args.x.q = x.q_[0].q;
  args.x.q_stride = x.lines_ * static_cast<int64_t>(sizeof(MapInput::Line));
  args.x.scale = x.scale_.data();
  args.x.sum16 = x.sum16_.data();
  args.n_tokens = x.n_;
  args.y = y;
  args.y_stride = y_stride;
  args.scratch = reinterpret_cast<uint8_t*>(x.scratch_.data());
  matmul(args);
}

void Map::add_row(int64_t row, std::vector<float>& buffer, float* y) const {
  buffer.resize(static_cast<size_t>(cols_));
  q8_0().dequantize(w_.data() + row * row_bytes_, buffer.data(), cols_);
  for (int64_t i = 0; i < cols_; ++i) y[i] += buffer[static_cast<size_t>(i)];
}

void scale_to_unit(const float* x, const float* factor, int64_t n, float* out) {
  double squares = 0;
  for (int64_t i = 0; i < n; ++i) squares += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  const float unit = static_cast<float>(1 / std::sqrt(squares / static_cast<double>(n) + 1e-20));
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * unit * factor[i];
}

}  // namespace stoker
