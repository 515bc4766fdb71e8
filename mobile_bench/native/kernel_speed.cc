#include "mobile_bench/native/kernel_speed.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <random>
#include <string>

#include "runtime/base/errors.h"

namespace stoker {

namespace {

// Rows of a piece of prefill in the engine; pieces of decode are larger (forward.cc).
constexpr int64_t kPromptRows = 64;
constexpr int64_t kDecodeTokens = 8;
// This many different rows are enough: no kernel's speed depends on values.
constexpr int64_t kPeriod = 64;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

int64_t checked(const char* what, int64_t n) {
  if (n >= 1) return n;
  throw Error(ErrorKind::kOption,
              std::string(what) + ": expected 1 or more, found " + std::to_string(n));
}

MatmulFn checked_kernel(const Format& f, Isa isa, int64_t cols) {
  if (!isa_usable(isa)) {
    throw Error(ErrorKind::kOption,
                std::string("instruction set ") + isa_name(isa) + " is not usable here");
  }
  checked("cols", cols);
  if (cols % f.block != 0 || cols % 32 != 0) {
    throw Error(ErrorKind::kOption, std::string(f.name) + ": expected columns in blocks of " +
                                        std::to_string(std::max(f.block, 32)) + ", found " +
                                        std::to_string(cols));
  }
  return matmul_kernel(f, isa);
}

}  // namespace

template <class T>
KernelProduct::Aligned<T>::Aligned(int64_t n) : memory(static_cast<size_t>(n) * sizeof(T) + 64) {
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  data = reinterpret_cast<T*>(memory.data() + (64 - address % 64) % 64);
}

KernelProduct::KernelProduct(const Format& f, Isa isa, int64_t rows, int64_t cols, int64_t tokens,
                             int threads)
    : kernel_(checked_kernel(f, isa, cols)),
      quantize_(quantize_act_kernel(isa)),
      rows_(checked("rows", rows)),
      piece_(tokens < kDecodeTokens
                 ? std::max<int64_t>(16, rows / (4 * checked("threads", threads)) / 16 * 16)
                 : kPromptRows),
      scratch_bytes_(static_cast<int64_t>((matmul_scratch_bytes(cols) + 63) / 64 * 64)),
      w_(static_cast<uint64_t>(rows * row_bytes(f, cols)), "a matrix to measure"),
      x_(checked("tokens", tokens) * cols),
      q_(tokens * ((cols + 63) / 64 * 64)),
      scale_(tokens * (cols / 32)),
      sum16_(tokens * (cols / 16)),
      y_(tokens * rows),
      scratch_(scratch_bytes_ * threads),
      pool_(threads) {
  std::mt19937 rng(1);
  const auto uniform = [&] { return static_cast<float>(rng() >> 8) * 0x1p-23f - 1.0f; };
  const int64_t bytes = row_bytes(f, cols), period = std::min(rows, kPeriod);
  std::vector<float> values(static_cast<size_t>(cols));
  for (int64_t r = 0; r < rows; ++r) {
    uint8_t* row = w_.data() + r * bytes;
    if (r >= period) {
      std::memcpy(row, row - period * bytes, static_cast<size_t>(bytes));
    } else if (f.quantize != nullptr) {
      for (float& v : values) v = uniform();
      f.quantize(values.data(), row, cols, nullptr);
    } else {
      // Bytes below 60 give finite scales in every format.
      for (int64_t i = 0; i < bytes; ++i) row[i] = static_cast<uint8_t>(rng() % 60);
    }
  }
  for (int64_t i = 0; i < tokens * cols; ++i) x_.get()[i] = uniform();
  args_.w = w_.data();
  args_.row_bytes = bytes;
  args_.n_tokens = tokens;
  args_.y = y_.get();
  args_.y_stride = rows;
  args_.x.kind = f.act;
  args_.x.tokens = tokens;
  args_.x.cols = cols;
  if (f.act == ActKind::f32) {
    args_.x.x = x_.get();
    args_.x.x_stride = cols;
    return;
  }
  args_.x.q_stride = (cols + 63) / 64 * 64;
  args_.x.q = q_.get();
  args_.x.scale = scale_.get();
  args_.x.sum16 = sum16_.get();
  quantize();
}

void KernelProduct::quantize() {
  if (args_.x.kind == ActKind::f32) return;
  const int64_t cols = args_.x.cols;
  pool_.parallel_for(args_.x.tokens, 4, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      quantize_(x_.get() + t * cols, cols, q_.get() + t * args_.x.q_stride,
                scale_.get() + t * (cols / 32), sum16_.get() + t * (cols / 16));
    }
  });
}

void KernelProduct::run() {
  const int64_t pieces = (rows_ + piece_ - 1) / piece_;
  pool_.parallel_for(pieces, 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i) {
      MatmulArgs args = args_;
      args.row_begin = i * piece_;
      args.row_end = std::min(rows_, args.row_begin + piece_);
      args.scratch = scratch_.get() + thread * scratch_bytes_;
      kernel_(args);
    }
  });
}

double kernel_speed(const Format& format, Isa isa, int64_t rows, int64_t cols, int64_t tokens,
                    int threads, double seconds, bool quantize) {
  KernelProduct product(format, isa, rows, cols, tokens, threads);
  const auto once = [&] {
    if (quantize) product.quantize();
    product.run();
  };
  double start = now();
  once();
  double best = now() - start;
  if (best >= seconds) return best;
  const double end = now() + seconds;
  best = seconds;
  do {
    start = now();
    once();
    best = std::min(best, now() - start);
  } while (now() < end);
  return best;
}

}  // namespace stoker
