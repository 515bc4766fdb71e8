#include "kernels_cpu/peak.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

#include "kernels_cpu/target.h"
#include "runtime/core/errors.h"

namespace stoker {

namespace {

using Clock = std::chrono::steady_clock;

// Keeps results alive without ordering the loops.
std::atomic<uint64_t> sink{0};

// Calls work(thread) on every thread at once; returns the seconds from the common start to the
// last end.
template <class F>
double timed(int threads, F&& work) {
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      ready.fetch_add(1);
      while (!go.load(std::memory_order_acquire)) {
      }
      work(t);
    });
  }
  while (ready.load() != threads) std::this_thread::yield();
  const auto start = Clock::now();
  go.store(true, std::memory_order_release);
  for (auto& t : pool) t.join();
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

constexpr int kChains = 10;  // independent accumulators, more than latency times throughput

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

// What an int8 product costs without VNNI: multiply to int16, add; widening is amortised.
int64_t dot_avx2(int64_t steps, uint64_t* out) {
  __m256i acc[kChains];
  const __m256i a = _mm256_set1_epi8(static_cast<char>(*out & 3));
  for (auto& x : acc) x = a;
  for (int64_t i = 0; i < steps; ++i) {
    for (auto& x : acc) {
      __m256i p = _mm256_maddubs_epi16(x, a);
      asm volatile("" : "+x"(p));  // the same product is not to be hoisted
      x = _mm256_add_epi16(x, p);
    }
  }
  __m256i s = acc[0];
  for (auto& x : acc) s = _mm256_xor_si256(s, x);
  *out = static_cast<uint64_t>(_mm256_extract_epi64(s, 0));
  return steps * kChains * 32;
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
STOKER_END_TARGET
#endif

#if STOKER_ARM64
STOKER_BEGIN_NEON
int64_t dot_neon(int64_t steps, uint64_t* out) {
  int32x4_t acc[kChains];
  const int8x16_t a = vdupq_n_s8(static_cast<int8_t>(*out & 3));
  for (auto& x : acc) x = vreinterpretq_s32_s8(a);
  for (int64_t i = 0; i < steps; ++i) {
    for (auto& x : acc) x = vdotq_s32(x, a, a);
  }
  int32x4_t s = acc[0];
  for (auto& x : acc) s = veorq_s32(s, x);
  *out = static_cast<uint64_t>(vgetq_lane_s32(s, 0));
  return steps * kChains * 16;
}
STOKER_END_TARGET
STOKER_BEGIN_I8MM
int64_t dot_i8mm(int64_t steps, uint64_t* out) {
  int32x4_t acc[kChains];
  const int8x16_t a = vdupq_n_s8(static_cast<int8_t>(*out & 3));
  for (auto& x : acc) x = vreinterpretq_s32_s8(a);
  for (int64_t i = 0; i < steps; ++i) {
    for (auto& x : acc) x = vmmlaq_s32(x, a, a);
  }
  int32x4_t s = acc[0];
  for (auto& x : acc) s = veorq_s32(s, x);
  *out = static_cast<uint64_t>(vgetq_lane_s32(s, 0));
  return steps * kChains * 32;
}
STOKER_END_TARGET
#endif

int64_t dot_scalar(int64_t steps, uint64_t* out) {
  int32_t acc[kChains];
  const int8_t a = static_cast<int8_t>(*out & 3);
  for (auto& x : acc) x = a;
  for (int64_t i = 0; i < steps; ++i) {
    for (auto& x : acc) x += static_cast<int8_t>(x) * a;
  }
  for (auto& x : acc) *out ^= static_cast<uint64_t>(x);
  return steps * kChains;
}

using Dot = int64_t (*)(int64_t steps, uint64_t* out);

Dot dot_for(Isa isa) {
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
  double best = 0;
  for (int pass = 0; pass < 5; ++pass) {
    const double seconds = timed(threads, [&](int t) {
      const int64_t begin = words * t / threads, end = words * (t + 1) / threads;
      sink.fetch_xor(read(buffer.get() + begin, end - begin), std::memory_order_relaxed);
    });
    best = std::max(best, static_cast<double>(words) * 8 / seconds);
  }
  return best;
}

double int8_peak(Isa isa, int threads) {
  if (threads < 1 || !isa_usable(isa)) {
    throw Error(ErrorKind::kOption, "int8_peak: expected a usable ISA and at least 1 thread");
  }
  const Dot dot = dot_for(isa);
  const int64_t steps = isa == Isa::scalar ? 4000000 : 8000000;
  double best = 0;
  for (int pass = 0; pass < 3; ++pass) {
    std::atomic<int64_t> macs{0};
    const double seconds = timed(threads, [&](int t) {
      uint64_t seed = static_cast<uint64_t>(t) + sink.load(std::memory_order_relaxed);
      macs.fetch_add(dot(steps, &seed), std::memory_order_relaxed);
      sink.fetch_xor(seed, std::memory_order_relaxed);
    });
    best = std::max(best, 2.0 * static_cast<double>(macs.load()) / seconds);
  }
  return best;
}

}  // namespace stoker
