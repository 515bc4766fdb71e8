#include "export/native/requantize.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "runtime/base/errors.h"
#include "runtime/base/start_threads.h"

namespace stoker {

namespace {

// Values of one work item: some tenths of a millisecond of the fastest format.
constexpr int64_t kPieceValues = int64_t{1} << 16;

constexpr uint32_t kMagnitude = 0x7fffffffu;
constexpr uint32_t kInfinity = 0x7f800000u;

// The bits of the smallest magnitude that the format cannot hold: magnitudes sort as their bits.
uint32_t first_beyond(const Format& f) {
  if (f.id == FormatId::F16) return std::bit_cast<uint32_t>(65520.0f);  // rounds to infinity
  if (f.id == FormatId::BF16) return 0x7f7f8000u;
  return kInfinity;
}

// The bits of the largest magnitude of x[n].
uint32_t largest_of(const float* x, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    largest = std::max(largest, std::bit_cast<uint32_t>(x[i]) & kMagnitude);
  }
  return largest;
}

// The index of the first of x[n] whose magnitude's bits reach `bits`; one must.
int64_t first_reaching(const float* x, uint32_t bits) {
  int64_t i = 0;
  while ((std::bit_cast<uint32_t>(x[i]) & kMagnitude) < bits) ++i;
  return i;
}

// The column of x[n] whose weight is beyond the target's scales, n if there is none. `to` is x
// quantized; x is overwritten if that has to be checked.
int64_t beyond_scales(const Format& target, uint32_t largest, const uint8_t* to, float* x,
                      int64_t n) {
  // The scales of blocks are f16 or wider, and at most as large as the largest weight.
  if (largest <= std::bit_cast<uint32_t>(65504.0f) || target.id == FormatId::F32) return n;
  const int64_t column = first_reaching(x, largest);
  const float exact = x[column];
  target.dequantize(to, x, n);
  // The error is within a half even if blocks have four bits and a power of two as their scale.
  return std::fabs(x[column] - exact) <= 0.5f * std::fabs(exact) ? n : column;
}

[[noreturn]] void refuse(const RequantizeArgs& a, int64_t index, float value) {
  char number[32];
  std::snprintf(number, sizeof number, "%g", static_cast<double>(value));
  const std::string range =
      std::isfinite(value) ? std::string(" that ") + a.target->name + " holds" : std::string();
  throw Error(ErrorKind::kModelFile, "row " + std::to_string(a.first_row + index / a.cols) +
                                         ", column " + std::to_string(index % a.cols) +
                                         ": expected a finite value" + range + ", found " + number);
}

}  // namespace

void requantize(const RequantizeArgs& a) {
  const int64_t source_bytes = row_bytes(*a.source, a.cols);
  const int64_t target_bytes = row_bytes(*a.target, a.cols);
  const int64_t piece_rows = std::max<int64_t>(1, kPieceValues / std::max<int64_t>(1, a.cols));
  const int64_t pieces = (a.rows + piece_rows - 1) / piece_rows;
  const uint32_t beyond = first_beyond(*a.target);
  std::atomic<int64_t> next{0};
  // The first bad weight. Pieces are taken in order, so those before a bad one are always finished.
  std::atomic<int64_t> bad{std::numeric_limits<int64_t>::max()};
  const auto work = [&](float* row) {
    for (int64_t piece; (piece = next.fetch_add(1)) < pieces;) {
      const int64_t begin = piece * piece_rows;
      const int64_t end = std::min(a.rows, begin + piece_rows);
      for (int64_t r = begin; r < end && r * a.cols < bad.load(); ++r) {
        const uint8_t* from = a.data + r * source_bytes;
        uint8_t* to = a.out + r * target_bytes;
        a.source->dequantize(from, row, a.cols);
        const uint32_t largest = largest_of(row, a.cols);
        int64_t column = a.cols;
        if (largest >= beyond) {
          column = first_reaching(row, beyond);
        } else if (a.source == a.target) {
          std::memcpy(to, from, static_cast<size_t>(target_bytes));
        } else {
          a.target->quantize(row, to, a.cols, a.importance);
          column = beyond_scales(*a.target, largest, to, row, a.cols);
        }
        if (column < a.cols) {
          int64_t known = bad.load();
          const int64_t index = r * a.cols + column;
          while (index < known && !bad.compare_exchange_weak(known, index)) {
          }
          break;
        }
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
  const int64_t index = bad.load();
  if (index == std::numeric_limits<int64_t>::max()) return;
  const int64_t r = index / a.cols;
  a.source->dequantize(a.data + r * source_bytes, rows[0].data(), a.cols);
  refuse(a, index, rows[0][static_cast<size_t>(index % a.cols)]);
}

}  // namespace stoker
