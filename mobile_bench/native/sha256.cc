#include "mobile_bench/native/sha256.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>

namespace stoker::bench {

namespace {

// The first 32 bits of the fraction of f(p) for the first kCount primes p.
template <int kCount, class F>
struct Fractions {
  uint32_t words[kCount];
  explicit Fractions(F f) {
    int count = 0;
    for (int n = 2; count < kCount; ++n) {
      bool prime = true;
      for (int d = 2; d * d <= n; ++d) prime = prime && n % d != 0;
      if (!prime) continue;
      const long double root = f(static_cast<long double>(n));
      words[count++] = static_cast<uint32_t>((root - std::floor(root)) * 4294967296.0L);
    }
  }
};

void add_block(const uint8_t* block, uint32_t* state) {
  static const Fractions<64, long double (*)(long double)> kRounds(
      [](long double x) { return std::cbrt(x); });
  uint32_t w[64];
  for (int i = 0; i < 16; ++i) {
    w[i] = 0;
    for (int j = 0; j < 4; ++j) w[i] = w[i] << 8 | block[4 * i + j];
  }
  for (int i = 16; i < 64; ++i) {
    const uint32_t a = w[i - 15], b = w[i - 2];
    w[i] = w[i - 16] + (std::rotr(a, 7) ^ std::rotr(a, 18) ^ (a >> 3)) + w[i - 7] +
           (std::rotr(b, 17) ^ std::rotr(b, 19) ^ (b >> 10));
  }
  uint32_t s[8];
  for (int i = 0; i < 8; ++i) s[i] = state[i];
  for (int i = 0; i < 64; ++i) {
    const uint32_t e = s[4], a = s[0];
    const uint32_t t1 = s[7] + (std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25)) +
                        ((e & s[5]) ^ (~e & s[6])) + kRounds.words[i] + w[i];
    const uint32_t t2 = (std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22)) +
                        ((a & s[1]) ^ (a & s[2]) ^ (s[1] & s[2]));
    for (int j = 7; j > 0; --j) s[j] = s[j - 1];
    s[4] += t1;
    s[0] = t1 + t2;
  }
  for (int i = 0; i < 8; ++i) state[i] += s[i];
}

}  // namespace

std::string sha256(std::string_view data) {
  const Fractions<8, long double (*)(long double)> start(
      [](long double x) { return std::sqrt(x); });
  uint32_t state[8];
  for (int i = 0; i < 8; ++i) state[i] = start.words[i];
  std::string padded(data);
  padded += '\x80';
  padded.append((120 - padded.size() % 64) % 64, '\0');
  const uint64_t bits = uint64_t{8} * data.size();
  for (int i = 7; i >= 0; --i) padded += static_cast<char>(bits >> (8 * i));
  for (size_t at = 0; at < padded.size(); at += 64) {
    add_block(reinterpret_cast<const uint8_t*>(padded.data()) + at, state);
  }
  std::string hex;
  for (const uint32_t word : state) {
    char text[9];
    std::snprintf(text, sizeof(text), "%08x", word);
    hex += text;
  }
  return hex;
}

}  // namespace stoker::bench
