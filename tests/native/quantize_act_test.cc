// Activations to int8: every usable ISA gives the scalar reference's bits, at every length and
// misalignment, on ordinary, extreme and non-finite values; the reference obeys kernel.h.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "kernels_cpu/kernel.h"

namespace {

using stoker::Isa;

int failures = 0;

#define CHECK(condition, ...)            \
  do {                                   \
    if (!(condition)) {                  \
      ++failures;                        \
      std::fprintf(stderr, "FAILED: ");  \
      std::fprintf(stderr, __VA_ARGS__); \
      std::fprintf(stderr, "\n");        \
    }                                    \
  } while (false)

struct Quantized {
  std::vector<int8_t> q;       // [cols rounded up to 64] + a guard byte
  std::vector<float> scale;    // [cols / 32]
  std::vector<int32_t> sum16;  // [cols / 16]

  Quantized(Isa isa, const float* x, int64_t cols)
      : q(static_cast<size_t>((cols + 63) / 64 * 64 + 1), 77),
        scale(static_cast<size_t>(cols / 32)),
        sum16(static_cast<size_t>(cols / 16)) {
    stoker::quantize_act_kernel(isa)(x, cols, q.data(), scale.data(), sum16.data());
  }
};

bool same_floats(const std::vector<float>& a, const std::vector<float>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// What each group may hold.
enum class Values { normal, mixed_sizes, ties, zeros, one_spike, tiny, huge, not_finite };
constexpr int kValues = 8;

void fill(float* x, int64_t cols, Values values, std::mt19937* rng) {
  std::normal_distribution<float> normal;
  for (int64_t k = 0; k < cols; ++k) {
    const float v = normal(*rng);
    switch (values) {
      case Values::normal:
        x[k] = v;
        break;
      case Values::mixed_sizes:
        x[k] = v * std::ldexp(1.0f, static_cast<int>((*rng)() % 60) - 30);
        break;
      case Values::ties:  // max 127: the factor is 1, and halves must round to even
        x[k] =
            k % 32 == 0 ? -127.0f : static_cast<float>(static_cast<int>((*rng)() % 253) - 126) / 2;
        break;
      case Values::zeros:
        x[k] = k % 64 < 32 ? (k % 2 == 0 ? 0.0f : -0.0f) : v;
        break;
      case Values::one_spike:
        x[k] = k % 32 == 17 ? -1e4f : v;
        break;
      case Values::tiny:
        x[k] = v * std::ldexp(1.0f, -110 - static_cast<int>(k / 32 % 39));
        break;
      case Values::huge:
        x[k] = std::copysign(std::numeric_limits<float>::max(), v) / static_cast<float>(1 + k % 5);
        break;
      case Values::not_finite:
        x[k] = k % 64 != 5         ? v
               : (*rng)() % 3 == 0 ? std::numeric_limits<float>::quiet_NaN()
                                   : std::copysign(std::numeric_limits<float>::infinity(), v);
        break;
    }
  }
}

void check_reference(const float* x, int64_t cols, Values values, const Quantized& r) {
  for (int64_t g = 0; g < cols / 32; ++g) {
    double max = 0;
    bool finite = true;
    for (int64_t k = 32 * g; k < 32 * g + 32; ++k) {
      finite = finite && std::isfinite(x[k]);
      max = std::fmax(max, std::fabs(static_cast<double>(x[k])));
    }
    const float scale = r.scale[static_cast<size_t>(g)];
    if (!finite) {
      CHECK(std::isnan(scale), "non-finite group has scale %g", static_cast<double>(scale));
    } else if (max > 1e-30) {
      CHECK(scale == static_cast<float>(max) / 127.0f, "scale of group %d", static_cast<int>(g));
    }
    int32_t sums[2] = {0, 0};
    for (int64_t k = 32 * g; k < 32 * g + 32; ++k) {
      const int q = r.q[static_cast<size_t>(k)];
      sums[(k - 32 * g) / 16] += q;
      CHECK(q >= -127, "q = %d", q);
      if (!finite) {
        CHECK(q == 0, "q = %d in a non-finite group", q);
      } else {
        const double error = std::fabs(static_cast<double>(scale) * q - x[k]);
        CHECK(error <= max * (0.5 / 127 * 1.0001) + 1e-34, "value %g became %g, kind %d",
              static_cast<double>(x[k]), static_cast<double>(scale) * q, static_cast<int>(values));
      }
      if (values == Values::ties) {
        CHECK(q == static_cast<int>(std::nearbyint(x[k])), "tie %g became %d",
              static_cast<double>(x[k]), q);
      }
    }
    for (int h = 0; h < 2; ++h) {
      CHECK(r.sum16[static_cast<size_t>(2 * g + h)] == sums[h], "sum16 of group %d",
            static_cast<int>(g));
    }
  }
  for (int64_t k = cols; k < (cols + 63) / 64 * 64; ++k) {
    CHECK(r.q[static_cast<size_t>(k)] == 0, "padding byte %d", static_cast<int>(k));
  }
  CHECK(r.q.back() == 77, "wrote beyond the padding at %d columns", static_cast<int>(cols));
}

}  // namespace

int main() {
  std::mt19937 rng(7);
  int cases = 0;
  for (int64_t cols = 32; cols <= 416; cols += 32) {
    for (int v = 0; v < kValues; ++v) {
      for (int shift = 0; shift < 4; ++shift) {
        std::vector<float> memory(static_cast<size_t>(cols + shift));
        float* x = memory.data() + shift;
        fill(x, cols, static_cast<Values>(v), &rng);
        const Quantized reference(Isa::scalar, x, cols);
        check_reference(x, cols, static_cast<Values>(v), reference);
        for (int i = 1; i < stoker::kIsaCount; ++i) {
          const Isa isa = static_cast<Isa>(i);
          if (!stoker::isa_usable(isa)) continue;
          const Quantized other(isa, x, cols);
          ++cases;
          CHECK(other.q == reference.q && same_floats(other.scale, reference.scale) &&
                    other.sum16 == reference.sum16,
                "%s differs from scalar: %d columns, values %d, shift %d", stoker::isa_name(isa),
                static_cast<int>(cols), v, shift);
        }
      }
    }
  }
  std::printf("quantize_act: %d comparisons, %d failures\n", cases, failures);
  return failures == 0 ? 0 : 1;
}
