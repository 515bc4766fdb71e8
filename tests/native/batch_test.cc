// Batch invariance at sizes that cross every block of the many-token path (tile_blocking.h): what a
// token computes among hundreds, with a token list, in row slices, has the bits that it computes
// alone. (matmul_test compares small sizes with the scalar reference.)
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "kernels_cpu/kernel.h"
#include "kernels_cpu/isa/tile_blocking.h"

namespace {

using stoker::ActKind;
using stoker::Format;
using stoker::Isa;
using stoker::MatmulArgs;

template <class T>
T* aligned(std::vector<T>* memory, size_t n) {
  memory->assign(n + 64 / sizeof(T), T{});
  const auto address = reinterpret_cast<uintptr_t>(memory->data());
  return memory->data() + (64 - address % 64) % 64 / sizeof(T);
}

int failures = 0;

void check(const Format& f, Isa isa, int64_t cols, int64_t rows, int64_t tokens,
           std::mt19937* rng) {
  std::vector<uint8_t> w(static_cast<size_t>(rows * stoker::row_bytes(f, cols)));
  std::vector<float> row(static_cast<size_t>(f.block));
  for (size_t at = 0; at < w.size(); at += static_cast<size_t>(f.block_bytes)) {
    bool sane = false;
    while (!sane) {  // random bytes; a block of infinities or NaN would hide differences
      for (int i = 0; i < f.block_bytes; ++i) w[at + static_cast<size_t>(i)] = (*rng)() & 0xff;
      f.dequantize(w.data() + at, row.data(), f.block);
      sane = true;
      for (float v : row) sane = sane && v > -1e6f && v < 1e6f;
    }
  }
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(tokens * cols));
  for (float& v : x) v = normal(*rng);

  MatmulArgs args;
  args.w = w.data();
  args.row_bytes = stoker::row_bytes(f, cols);
  args.x.kind = f.act;
  args.x.tokens = tokens;
  args.x.cols = cols;
  args.x.x = x.data();
  args.x.x_stride = cols;
  args.x.q_stride = stoker::round_up_64(cols);
  std::vector<int8_t> q_memory;
  std::vector<float> scale(static_cast<size_t>(tokens * cols / 32));
  std::vector<int32_t> sum16(static_cast<size_t>(tokens * cols / 16));
  int8_t* q = aligned(&q_memory, static_cast<size_t>(tokens * args.x.q_stride));
  for (int64_t t = 0; t < tokens; ++t) {
    stoker::quantize_act_kernel(isa)(x.data() + t * cols, cols, q + t * args.x.q_stride,
                                     scale.data() + t * (cols / 32),
                                     sum16.data() + t * (cols / 16));
  }
  args.x.q = q;
  args.x.scale = scale.data();
  args.x.sum16 = sum16.data();
  std::vector<uint8_t> scratch_memory;
  args.scratch = aligned(&scratch_memory, stoker::matmul_scratch_bytes(cols));
  const auto kernel = stoker::matmul_kernel(f, isa);

  std::vector<float> alone(static_cast<size_t>(tokens * rows), -1.0f), many = alone;
  args.y_stride = rows;
  args.row_end = rows;
  for (int32_t t = 0; t < tokens; ++t) {
    args.token_list = &t;
    args.n_tokens = 1;
    args.y = alone.data() + t * rows;
    kernel(args);
  }
  // The same tokens backwards, in one call a slice of rows.
  std::vector<int32_t> backwards(static_cast<size_t>(tokens));
  std::iota(backwards.rbegin(), backwards.rend(), 0);
  args.token_list = backwards.data();
  args.n_tokens = tokens;
  args.y = many.data();
  for (const int64_t cut : {rows, rows / 3}) {
    args.row_begin = 0;
    args.row_end = cut;
    kernel(args);
    args.row_begin = cut;
    args.row_end = rows;
    kernel(args);
    for (int64_t t = 0; t < tokens; ++t) {
      const float* got = many.data() + (tokens - 1 - t) * rows;
      if (std::memcmp(got, alone.data() + t * rows, static_cast<size_t>(rows) * 4) == 0) continue;
      std::fprintf(stderr, "FAILED: %s %s, %d columns, token %d of %d, rows cut at %d\n", f.name,
                   stoker::isa_name(isa), static_cast<int>(cols), static_cast<int>(t),
                   static_cast<int>(tokens), static_cast<int>(cut));
      ++failures;
      return;
    }
  }
}

}  // namespace

int main() {
  std::mt19937 rng(11);
  int cases = 0, count = 0;
  const Format* const* formats = stoker::all_formats(&count);
  const bool quick = std::getenv("STOKER_TEST_QUICK") != nullptr;
  for (int i = 0; i < count; ++i) {
    const Format& f = *formats[i];
    for (int k = 0; k < stoker::kIsaCount; ++k) {
      const Isa isa = static_cast<Isa>(k);
      if (!stoker::isa_usable(isa) || f.matmul[k] == nullptr) continue;
      if (isa == Isa::scalar) continue;  // computes every token alone
      const int64_t block = f.block < 32 ? 32 : f.block;
      const int64_t long_row = 2 * stoker::kBlockCols + block;
      check(f, isa, long_row, 35, stoker::kBlockTokens + 7, &rng);
      ++cases;
      if (quick) continue;
      check(f, isa, stoker::kBlockCols, 5, 2 * stoker::kBlockTokens, &rng);
      check(f, isa, stoker::kBlockCols - block, 64, 2 * stoker::kBlockTokens + 1, &rng);
      cases += 2;
    }
  }
  std::printf("batch_test: %d cases, %d failures\n", cases, failures);
  return failures == 0 ? 0 : 1;
}
