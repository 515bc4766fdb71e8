#include "runtime/core/activation_sums.h"

#include <utility>

namespace stoker {

ActivationSums::ActivationSums(std::shared_ptr<const Engine> engine) : engine_(std::move(engine)) {
  for (const GgufTensor& t : engine_->file().tensors()) {
    Tensor sums{t.name, static_cast<int64_t>(t.ne[0]), {}, {}};
    if (t.n_dims >= 2 && t.ne[1] * t.ne[2] > 1) {
      const auto slices = static_cast<size_t>(t.ne[2]);
      sums.squares.resize(static_cast<size_t>(sums.cols) * slices);
      sums.counts.resize(slices);
    }
    tensors_.push_back(std::move(sums));
  }
}

void ActivationSums::product(const Matrix& matrix, const Activations& x, const int32_t* token_list,
                             int64_t first, int64_t n) {
  if (matrix.tensor < 0) return;
  Tensor& tensor = tensors_[static_cast<size_t>(matrix.tensor)];
  const auto slice = static_cast<size_t>(matrix.slice);
  if (slice >= tensor.counts.size()) return;
  tensor.counts[slice] += n;
  double* sums = tensor.squares.data() + matrix.slice * tensor.cols;
  // A column belongs to one thread, which adds its tokens in order: the sums are the same for any
  // number of threads.
  engine_->pool().parallel_for(tensor.cols, 256, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = 0; i < n; ++i) {
      const float* row = x.x + (token_list ? token_list[i] : first + i) * x.x_stride;
      for (int64_t c = begin; c < end; ++c) {
        sums[c] += static_cast<double>(row[c]) * static_cast<double>(row[c]);
      }
    }
  });
}

}  // namespace stoker
