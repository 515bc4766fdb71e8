#include "mobile_bench/native/peak.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "kernels_cpu/target.h"
#include "runtime/base/errors.h"
#include "runtime/base/start_threads.h"

namespace stoker {

namespace {

using Clock = std::chrono::steady_clock;

// Keeps results alive without imposing an order on the loops.
std::atomic<uint64_t> sink{0};

// Calls work(thread) on every thread at once; returns the seconds from the common start to the
// last end. Throws Error(kDevice) if the system does not give that many threads.
template <class F>
double timed(int threads, F&& work) {
  std::atomic<int> ready{0};
  std::atomic<int> go{0};  // 1: begin; -1: leave
  std::vector<std::thread> pool = start_threads(threads, [&](int t) {
    ready.fetch_add(1);
    while (go.load(std::memory_order_acquire) == 0) {
    }
    if (go.load() > 0) work(t);
  });
  if (static_cast<int>(pool.size()) < threads) {
    go.store(-1);
    join(pool);
    throw Error(ErrorKind::kDevice, "expected " + std::to_string(threads) +
                                        " threads to measure with, found that the system gives " +
                                        std::to_string(pool.size()));
  }
  while (ready.load() != threads) std::this_thread::yield();
  const auto start = Clock::now();
  go.store(1, std::memory_order_release);
  join(pool);
  return std::chrono::duration<double>(Clock::now() - start).count();
}

uint64_t read_all(const uint64_t* p, int64_t n) {
  uint64_t a = 0, b = 0, c = 0, d = 0;
  for (int64_t i = 0; i + 4 <= n; i += 4) {
    a ^= p[i];
    b ^= p[i + 1];
    c ^= p[i + 2];
    d ^= p[i + 3];
  }
  return a ^ b ^ c ^ d;
}

// Independent accumulators: more than latency times throughput, and all fit in registers.
constexpr int kChains = 10;
[[maybe_unused]] constexpr int kManyChains = 16;  // ARM has 32 registers
constexpr int kScalarSteps = 16;  // this many of the others take as long as one of dot_scalar
constexpr float kSmall = 1e-5f;

#if STOKER_X86
STOKER_BEGIN_AVX2
uint64_t read_all_avx2(const uint64_t* p, int64_t n) {
  __m256i s[4] = {};
  const auto* v = reinterpret_cast<const __m256i*>(p);
  for (int64_t i = 0; i + 16 <= n; i += 16, v += 4) {
    for (int j = 0; j < 4; ++j) s[j] = _mm256_xor_si256(s[j], _mm256_loadu_si256(v + j));
  }
  __m256i t = _mm256_xor_si256(_mm256_xor_si256(s[0], s[1]), _mm256_xor_si256(s[2], s[3]));
  return static_cast<uint64_t>(_mm256_extract_epi64(t, 0) ^ _mm256_extract_epi64(t, 3));
}

// The cost of an int8 product without VNNI: multiply to int16, add; widening is amortised.
int64_t dot_avx2(int64_t steps, uint64_t* out) {
  __m256i acc[kChains];
  const __m256i a = _mm256_set1_epi8(static_cast<char>(*out & 3));
  for (auto& x : acc) x = a;
  for (int64_t i = 0; i < steps; ++i) {
    for (auto& x : acc) {
      __m256i p = _mm256_maddubs_epi16(x, a);
      asm volatile("" : "+x"(p));  // keeps the compiler from hoisting the product
      x = _mm256_add_epi16(x, p);
    }
  }
  __m256i s = acc[0];
  for (auto& x : acc) s = _mm256_xor_si256(s, x);
  *out = static_cast<uint64_t>(_mm256_extract_epi64(s, 0));
  return steps * kChains * 32;
}

// The sums stay as they are, since a * a is below half a unit in their last place.
int64_t fma_avx2(int64_t steps, uint64_t* out) {
  __m256 acc[kChains];
  const __m256 a = _mm256_set1_ps(kSmall);
  for (auto& x : acc) x = _mm256_set1_ps(static_cast<float>(1 + (*out & 3)));
  for (int64_t i = 0; i < steps; ++i) {
    for (auto& x : acc) x = _mm256_fmadd_ps(a, a, x);
  }
  __m256 s = acc[0];
  for (auto& x : acc) s = _mm256_add_ps(s, x);
  *out = static_cast<uint64_t>(_mm256_cvtss_f32(s));
  return steps * kChains * 8;
}
STOKER_END_TARGET

STOKER_BEGIN_AVXVNNI
int64_t dot_avxvnni(int64_t steps, uint64_t* out) {
  __m256i acc[kChains];
  const __m256i a = _mm256_set1_epi8(static_cast<char>(*out & 3));
  for (auto& x : acc) x = a;
  for (int64_t i = 0; i < steps; ++i) {
    for (auto& x : acc) x = _mm256_dpbusd_avx_epi32(x, a, a);
  }
  __m256i s = acc[0];
  for (auto& x : acc) s = _mm256_xor_si256(s, x);
  *out = static_cast<uint64_t>(_mm256_extract_epi64(s, 0));
  return steps * kChains * 32;
}
STOKER_END_TARGET

STOKER_BEGIN_AVX512
int64_t dot_avx512(int64_t steps, uint64_t* out) {
  __m512i acc[kChains];
  const __m512i a = _mm512_set1_epi8(static_cast<char>(*out & 3));
  for (auto& x : acc) x = a;
  for (int64_t i = 0; i < steps; ++i) {
    for (auto& x : acc) x = _mm512_dpbusd_epi32(x, a, a);
  }
  __m512i s = acc[0];
  for (auto& x : acc) s = _mm512_xor_si512(s, x);
  *out = static_cast<uint64_t>(_mm_extract_epi64(_mm512_castsi512_si128(s), 0));
  return steps * kChains * 64;
}

int64_t fma_avx512(int64_t steps, uint64_t* out) {
  __m512 acc[kChains];
  const __m512 a = _mm512_set1_ps(kSmall);
  for (auto& x : acc) x = _mm512_set1_ps(static_cast<float>(1 + (*out & 3)));
  for (int64_t i = 0; i < steps; ++i) {
    for (auto& x : acc) x = _mm512_fmadd_ps(a, a, x);
  }
  __m512 s = acc[0];
  for (auto& x : acc) s = _mm512_add_ps(s, x);
  *out = static_cast<uint64_t>(_mm512_cvtss_f32(s));
  return steps * kChains * 16;
}
STOKER_END_TARGET
#endif

#if STOKER_ARM64
STOKER_BEGIN_NEON
int64_t dot_neon(int64_t steps, uint64_t* out) {
  int32x4_t acc[kManyChains];
  const int8x16_t a = vdupq_n_s8(static_cast<int8_t>(*out & 3));
  for (auto& x : acc) x = vreinterpretq_s32_s8(a);
  for (int64_t i = 0; i < steps; ++i) {
    for (auto& x : acc) x = vdotq_s32(x, a, a);
  }
  int32x4_t s = acc[0];
  for (auto& x : acc) s = veorq_s32(s, x);
  *out = static_cast<uint64_t>(vgetq_lane_s32(s, 0));
  return steps * kManyChains * 16;
}

int64_t fma_neon(int64_t steps, uint64_t* out) {
  float32x4_t acc[kManyChains];
  const float32x4_t a = vdupq_n_f32(kSmall);
  for (auto& x : acc) x = vdupq_n_f32(static_cast<float>(1 + (*out & 3)));
  for (int64_t i = 0; i < steps; ++i) {
    for (auto& x : acc) x = vfmaq_f32(x, a, a);
  }
  float32x4_t s = acc[0];
  for (auto& x : acc) s = vaddq_f32(s, x);
  *out = static_cast<uint64_t>(vgetq_lane_f32(s, 0));
  return steps * kManyChains * 4;
}
STOKER_END_TARGET
STOKER_BEGIN_I8MM
int64_t dot_i8mm(int64_t steps, uint64_t* out) {
  int32x4_t acc[kManyChains];
  const int8x16_t a = vdupq_n_s8(static_cast<int8_t>(*out & 3));
  for (auto& x : acc) x = vreinterpretq_s32_s8(a);
  for (int64_t i = 0; i < steps; ++i) {
    for (auto& x : acc) x = vmmlaq_s32(x, a, a);
  }
  int32x4_t s = acc[0];
  for (auto& x : acc) s = veorq_s32(s, x);
  *out = static_cast<uint64_t>(vgetq_lane_s32(s, 0));
  return steps * kManyChains * 32;
}
STOKER_END_TARGET
#endif

// Plain C++ as in the scalar kernels, left to the compiler; operands are in the nearest cache.
int64_t dot_scalar(int64_t steps, uint64_t* out) {
  constexpr int kLength = 256;
  int8_t a[kLength], b[kLength];
  for (int k = 0; k < kLength; ++k) {
    a[k] = static_cast<int8_t>(*out & 3);
    b[k] = static_cast<int8_t>(k & 3);
  }
  int32_t sum = 0;  // grows by at most 9 * kLength per step
  for (int64_t i = 0; i < steps; i += kScalarSteps) {
    asm volatile("" : : "r"(a), "r"(b) : "memory");  // no reuse of the last step's sum
    for (int k = 0; k < kLength; ++k) sum += a[k] * b[k];
  }
  *out ^= static_cast<uint64_t>(sum);
  return (steps + kScalarSteps - 1) / kScalarSteps * kLength;
}

int64_t fma_scalar(int64_t steps, uint64_t* out) {
  float acc[kChains];
  const float a = kSmall * static_cast<float>(1 + (*out & 3));
  for (auto& x : acc) x = 1;
  for (int64_t i = 0; i < steps; ++i) {
#if STOKER_ARM64
    for (auto& x : acc) x = std::fma(a, a, x);
#else
    for (auto& x : acc) x = x * a + a;
#endif
  }
  for (auto& x : acc) *out ^= static_cast<uint64_t>(x * 1000);
  return steps * kChains;
}

// Returns the multiply-adds done in `steps` steps; *out holds any number and gets another.
using Kernel = int64_t (*)(int64_t steps, uint64_t* out);

Kernel int8_kernel(Isa isa) {
  switch (isa) {
#if STOKER_X86
    case Isa::avx2:
      return dot_avx2;
    case Isa::avxvnni:
      return dot_avxvnni;
    case Isa::avx512:
      return dot_avx512;
#endif
#if STOKER_ARM64
    case Isa::neon:
      return dot_neon;
    case Isa::i8mm:
      return dot_i8mm;
#endif
    default:
      return dot_scalar;
  }
}

Kernel float32_kernel(Isa isa) {
  switch (isa) {
#if STOKER_X86
    case Isa::avx2:
    case Isa::avxvnni:
      return fma_avx2;
    case Isa::avx512:
      return fma_avx512;
#endif
#if STOKER_ARM64
    case Isa::neon:
    case Isa::i8mm:
      return fma_neon;
#endif
    default:
      return fma_scalar;
  }
}

// Operations per second of all threads together; each works on its own until the time is over, so
// slow cores do not hold fast ones up.
double peak(Kernel kernel, int threads) {
  // There are many short passes: together long enough for the clock to rise, each short enough to
  // find a moment when nothing else wants the cores.
  constexpr double kPassSeconds = 0.01;
  constexpr int kPasses = 10;
  constexpr int64_t kSteps = 20000;  // about 20 us, so that looking at the clock costs little
  double best = 0;
  for (int pass = 0; pass < kPasses; ++pass) {
    std::vector<double> rates(static_cast<size_t>(threads));
    timed(threads, [&](int t) {
      uint64_t seed = static_cast<uint64_t>(t) + sink.load(std::memory_order_relaxed);
      int64_t done = 0;
      double seconds = 0;
      const auto begin = Clock::now();
      do {
        done += kernel(kSteps, &seed);
        seconds = std::chrono::duration<double>(Clock::now() - begin).count();
      } while (seconds < kPassSeconds);
      rates[static_cast<size_t>(t)] = 2.0 * static_cast<double>(done) / seconds;
      sink.fetch_xor(seed, std::memory_order_relaxed);
    });
    best = std::max(best, std::accumulate(rates.begin(), rates.end(), 0.0));
  }
  return best;
}

void check(const char* what, Isa isa, int threads) {
  if (threads >= 1 && isa_usable(isa)) return;
  throw Error(ErrorKind::kOption,
              std::string(what) + ": expected a usable ISA and at least 1 thread");
}

}  // namespace

double read_bandwidth(int threads, int64_t bytes) {
  if (threads < 1 || bytes < 1) {
    throw Error(ErrorKind::kOption, "read_bandwidth: expected at least 1 thread and 1 byte");
  }
  const int64_t words = bytes / 8;
  const std::unique_ptr<uint64_t[]> buffer(new uint64_t[static_cast<size_t>(words + 1)]);
  for (int64_t i = 0; i < words; ++i) buffer[static_cast<size_t>(i)] = static_cast<uint64_t>(i);
  auto read = read_all;
#if STOKER_X86
  if (isa_usable(Isa::avx2)) read = read_all_avx2;
#endif
  // Pieces are long enough that the hardware prefetcher's start costs nothing, and many per thread.
  constexpr int64_t kMost = (int64_t{4} << 20) / 8, kLeast = 8192;
  const int64_t piece = std::clamp(words / (16 * int64_t{threads}), kLeast, kMost) / 16 * 16;
  double best = 0;
  for (int pass = 0; pass < 5; ++pass) {
    std::atomic<int64_t> next{0};
    const double seconds = timed(threads, [&](int) {
      uint64_t found = 0;
      for (;;) {
        const int64_t begin = next.fetch_add(piece, std::memory_order_relaxed);
        if (begin >= words) break;
        found ^= read(buffer.get() + begin, std::min(piece, words - begin));
      }
      sink.fetch_xor(found, std::memory_order_relaxed);
    });
    best = std::max(best, static_cast<double>(words) * 8 / seconds);
  }
  return best;
}

double int8_peak(Isa isa, int threads) {
  check("int8_peak", isa, threads);
  return peak(int8_kernel(isa), threads);
}

double float32_peak(Isa isa, int threads) {
  check("float32_peak", isa, threads);
  return peak(float32_kernel(isa), threads);
}

}  // namespace stoker
