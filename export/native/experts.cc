#include "export/native/experts.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "runtime/base/start_threads.h"

namespace stoker {

namespace {

// Values of one work item: large enough to make handing out free, small enough to balance.
constexpr int64_t kPieceValues = int64_t{1} << 17;

// The finalizer of SplitMix64 (Steele, Lea, Flood 2014): 64 well-mixed bits of a counter.
inline uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// x[j] *= 1 + step * k with k uniform in -32768 .. 32767; four values share the 64 bits that are
// drawn for their place in the matrix.
void add_noise(float* x, int64_t n, float step, uint64_t seed, uint64_t counter) {
  constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;
  for (int64_t j = 0; j < n; j += 4, ++counter) {
    uint64_t bits = mix(seed + counter * kGolden);
    for (int64_t i = j; i < std::min(n, j + 4); ++i, bits >>= 16) {
      const auto k = static_cast<int16_t>(static_cast<uint16_t>(bits));
      x[i] *= 1.0f + step * static_cast<float>(k);
    }
  }
}

}  // namespace

void make_experts(const ExpertsArgs& a) {
  const int64_t stride = row_bytes(*a.format, a.cols);
  const int64_t neurons = a.axis == NeuronAxis::kRows ? a.rows : a.cols;
  const int64_t piece_rows = std::max<int64_t>(1, kPieceValues / std::max<int64_t>(1, a.cols));
  const int64_t pieces_each = (a.rows + piece_rows - 1) / piece_rows;
  const int64_t pieces = a.experts * pieces_each;
  // A uniform variable over -32768 .. 32767 has a standard deviation of 65536 / sqrt(12).
  const float step = a.noise * (3.4641016f / 65536.0f);
  const uint64_t counters_a_row = static_cast<uint64_t>((a.cols + 3) / 4);
  std::atomic<int64_t> next{0};
  const auto work = [&](float* row) {
    for (int64_t piece; (piece = next.fetch_add(1)) < pieces;) {
      const int64_t e = piece / pieces_each;
      const int32_t* order = a.order + e * neurons;
      const int64_t begin = piece % pieces_each * piece_rows;
      const int64_t end = std::min(a.rows, begin + piece_rows);
      for (int64_t r = begin; r < end; ++r) {
        if (a.axis == NeuronAxis::kRows) {
          std::memcpy(row, a.x + order[r] * a.cols, static_cast<size_t>(a.cols) * sizeof(float));
        } else {
          const float* source = a.x + r * a.cols;
          for (int64_t j = 0; j < a.cols; ++j) row[j] = source[order[j]];
        }
        if (step != 0) {
          add_noise(row, a.cols, step, a.seed[e], static_cast<uint64_t>(r) * counters_a_row);
        }
        a.format->quantize(row, a.out + (e * a.rows + r) * stride, a.cols, nullptr);
      }
    }
  };
  const auto threads =
      static_cast<size_t>(std::clamp<int64_t>(a.threads, 1, std::max<int64_t>(1, pieces)));
  std::vector<std::vector<float>> rows(threads, std::vector<float>(static_cast<size_t>(a.cols)));
  std::vector<std::thread> others = start_threads(
      static_cast<int>(threads) - 1, [&](int i) { work(rows[static_cast<size_t>(i) + 1].data()); });
  work(rows[0].data());
  join(others);
}

}  // namespace stoker
