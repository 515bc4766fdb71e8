// Speed of every matmul kernel on one core: GB/s of weights for one token over a matrix that does
// not fit the caches, and over one that fits the last-level cache, and GOP/s (a multiplication and
// an addition are two) for many tokens.
//
//   matmul_bench [--cols K] [--tokens N] [--megabytes M] [--isa NAME] [format ...]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels_cpu/cpu.h"
#include "kernels_cpu/kernel.h"

namespace {

using stoker::ActKind;
using stoker::Format;
using stoker::Isa;
using stoker::MatmulArgs;

// 64-byte aligned memory.
template <class T>
class Aligned {
 public:
  explicit Aligned(size_t n) : memory_(n * sizeof(T) + 64) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    data_ = reinterpret_cast<T*>(memory_.data() + (64 - address % 64) % 64);
  }
  T* data() { return data_; }

 private:
  std::vector<uint8_t> memory_;
  T* data_;
};

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Seconds of the fastest call among those that fit in about `budget` seconds.
template <class F>
double fastest(double budget, F f) {
  f();
  double best = 1e9;
  const double end = now() + budget;
  do {
    const double start = now();
    f();
    best = std::min(best, now() - start);
  } while (now() < end);
  return best;
}

struct Bench {
  Bench(const Format& format, int64_t cols, int64_t rows, int64_t tokens)
      : f(format),
        w(static_cast<size_t>(rows * row_bytes(format, cols))),
        x(static_cast<size_t>(tokens * cols)),
        q(static_cast<size_t>(tokens * (cols + 64))),
        scale(static_cast<size_t>(tokens * cols / 32)),
        sum16(static_cast<size_t>(tokens * cols / 16)),
        y(static_cast<size_t>(tokens * rows)),
        scratch(stoker::matmul_scratch_bytes(cols)) {
    std::mt19937 rng(1);
    std::normal_distribution<float> normal;
    // A few different rows are enough; their blocks come from real numbers where the format can be
    // written here, and from random bytes else.
    const int64_t bytes = row_bytes(f, cols), period = std::min<int64_t>(rows, 64);
    for (int64_t r = 0; r < rows; ++r) {
      uint8_t* row = w.data() + r * bytes;
      if (r >= period) {
        std::memcpy(row, row - period * bytes, static_cast<size_t>(bytes));
      } else if (f.quantize != nullptr) {
        std::vector<float> values(static_cast<size_t>(cols));
        for (float& v : values) v = normal(rng);
        f.quantize(values.data(), row, cols, nullptr);
      } else {
        for (int64_t i = 0; i < bytes; ++i) row[i] = static_cast<uint8_t>(rng() % 60);
      }
    }
    for (int64_t i = 0; i < tokens * cols; ++i) x.data()[i] = normal(rng);
    args.w = w.data();
    args.row_bytes = bytes;
    args.row_end = rows;
    args.n_tokens = tokens;
    args.y = y.data();
    args.y_stride = rows;
    args.scratch = scratch.data();
    args.x.kind = f.act;
    args.x.tokens = tokens;
    args.x.cols = cols;
    if (f.act == ActKind::f32) {
      args.x.x = x.data();
      args.x.x_stride = cols;
      return;
    }
    args.x.q_stride = (cols + 63) / 64 * 64;
    const auto quantize = stoker::quantize_act_kernel(stoker::active_isa());
    for (int64_t t = 0; t < tokens; ++t) {
      quantize(x.data() + t * cols, cols, q.data() + t * args.x.q_stride,
               scale.data() + t * cols / 32, sum16.data() + t * cols / 16);
    }
    args.x.q = q.data();
    args.x.scale = scale.data();
    args.x.sum16 = sum16.data();
  }

  const Format& f;
  Aligned<uint8_t> w;
  Aligned<float> x;
  Aligned<int8_t> q;
  Aligned<float> scale;
  Aligned<int32_t> sum16;
  Aligned<float> y;
  Aligned<uint8_t> scratch;
  MatmulArgs args;
};

double gigabytes_per_second(const Format& f, Isa isa, int64_t cols, int64_t bytes) {
  const int64_t rows = bytes / row_bytes(f, cols) / 64 * 64;
  Bench bench(f, cols, rows, 1);
  const auto kernel = stoker::matmul_kernel(f, isa);
  const double seconds = fastest(0.25, [&] { kernel(bench.args); });
  return static_cast<double>(rows * row_bytes(f, cols)) / seconds * 1e-9;
}

double giga_ops(const Format& f, Isa isa, int64_t cols, int64_t rows, int64_t tokens) {
  Bench bench(f, cols, rows, tokens);
  const auto kernel = stoker::matmul_kernel(f, isa);
  const double seconds = fastest(0.15, [&] { kernel(bench.args); });
  return 2.0 * static_cast<double>(rows * cols * tokens) / seconds * 1e-9;
}

}  // namespace

int main(int argc, char** argv) {
  int64_t cols = 1536, tokens = 512, megabytes = 96;
  std::string only_isa;
  std::vector<std::string> names;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    const bool option = arg.rfind("--", 0) == 0;
    if (option && i + 1 == argc) {
      std::fprintf(stderr, "matmul_bench: %s wants a value\n", arg.c_str());
      return 2;
    }
    if (arg == "--cols") {
      cols = std::atoll(argv[++i]);
    } else if (arg == "--tokens") {
      tokens = std::atoll(argv[++i]);
    } else if (arg == "--megabytes") {
      megabytes = std::atoll(argv[++i]);
    } else if (arg == "--isa") {
      only_isa = argv[++i];
    } else if (option || stoker::find_format(argv[i]) == nullptr) {
      std::fprintf(stderr, "matmul_bench: %s is neither an option nor a format\n", argv[i]);
      return 2;
    } else {
      names.push_back(arg);
    }
  }
  std::printf("%s, one core, %lld columns\n", stoker::cpu().name.c_str(),
              static_cast<long long>(cols));
  std::printf("%-8s %-8s %12s %12s %10s %10s\n", "format", "isa", "GB/s memory", "GB/s 8 MB",
              "GOP/s n=8", ("n=" + std::to_string(tokens)).c_str());
  int count = 0;
  const Format* const* formats = stoker::all_formats(&count);
  for (int i = 0; i < count; ++i) {
    const Format& f = *formats[i];
    if (!names.empty() && std::find(names.begin(), names.end(), f.name) == names.end()) continue;
    if (cols % f.block != 0 || cols % 32 != 0) continue;
    for (int k = 0; k < stoker::kIsaCount; ++k) {
      const Isa isa = static_cast<Isa>(k);
      if (f.matmul[k] == nullptr || !stoker::isa_usable(isa)) continue;
      if (only_isa.empty() ? isa == Isa::scalar : only_isa != stoker::isa_name(isa)) continue;
      std::printf("%-8s %-8s %12.1f %12.1f %10.1f %10.1f\n", f.name, stoker::isa_name(isa),
                  gigabytes_per_second(f, isa, cols, megabytes << 20),
                  gigabytes_per_second(f, isa, cols, 8 << 20), giga_ops(f, isa, cols, 576, 8),
                  giga_ops(f, isa, cols, 576, tokens));
      std::fflush(stdout);
    }
  }
  return 0;
}
