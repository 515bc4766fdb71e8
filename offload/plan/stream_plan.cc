#include "offload/plan/stream_plan.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "offload/io/io.h"

namespace stoker {

namespace {

constexpr int64_t kMostRing = 2 * kRingReads * kMostRead;
constexpr int64_t kLeastRing = kRingReads * kLeastRead;
// The cost of a read besides its bytes, as bytes read in that time: 25 us at 3 GB/s, four at a
// time.
constexpr double kReadCost = 75e3;
// Neighbours in the file with a gap smaller than this are one read.
constexpr uint64_t kMergeGap = 64 * 1024;
// The rows of a read are a multiple of what kernels take at once.
constexpr int64_t kRowTile = 16;

int64_t read_rows(const StreamTensor& t, int64_t bytes) {
  const int64_t fit = bytes / std::max<int64_t>(t.row_bytes(), 1) / kRowTile * kRowTile;
  return std::min(t.rows, std::max(fit, kRowTile));
}

// Returns the ring with which a forward pass reads for the shortest time where `missing` bytes do
// not fit. The ring takes memory from weights that would be pinned, so that (missing + ring) * (1 +
// kReadCost / (ring / kRingReads)) has to be least.
int64_t best_ring(int64_t missing) {
  return static_cast<int64_t>(
      std::sqrt(static_cast<double>(missing) * static_cast<double>(kRingReads) * kReadCost));
}

// Returns the memory of the largest read where reads have about `bytes`.
int64_t largest_span(const std::vector<StreamTensor>& order, int64_t bytes) {
  int64_t most = bytes;
  for (const StreamTensor& t : order) most = std::max(most, read_rows(t, bytes) * t.row_bytes());
  return most + 2 * static_cast<int64_t>(kIoAlign);
}

// Returns these extents and the gaps between them as one; bytes is 0 where a gap is too large or
// the files differ.
Extent joined(std::vector<Extent> all) {
  std::sort(all.begin(), all.end(), [](const Extent& a, const Extent& b) {
    return a.shard != b.shard ? a.shard < b.shard : a.offset < b.offset;
  });
  Extent e = all.front();
  for (const Extent& x : all) {
    const uint64_t end = e.offset + e.bytes;
    if (x.shard != e.shard || x.offset > end + kMergeGap) return {};
    e.bytes = std::max(end, x.offset + x.bytes) - e.offset;
  }
  return e;
}

// Cuts the forward pass into pieces and reads of about `bytes`. Only whole tensors are joined, so
// that a read is pinned as a whole or not at all.
void cut(const std::vector<StreamTensor>& order, int64_t bytes, StreamPlan& plan) {
  const auto add = [&](const StreamTensor& t, int64_t begin, int64_t end) {
    StreamPiece p{t.tensor, static_cast<int32_t>(plan.reads.size()), begin, end, t.extent};
    p.extent.offset += static_cast<uint64_t>(begin * t.row_bytes());
    p.extent.bytes = static_cast<uint64_t>((end - begin) * t.row_bytes());
    plan.pieces.push_back(p);
  };
  const auto read = [&](size_t first, const Extent& extent) {
    plan.reads.push_back(
        {static_cast<int32_t>(first), static_cast<int32_t>(plan.pieces.size()), extent, false});
  };
  for (size_t i = 0; i < order.size();) {
    const StreamTensor& t = order[i];
    if (const int64_t rows = read_rows(t, bytes); rows < t.rows) {
      for (int64_t begin = 0; begin < t.rows; begin += rows) {
        const size_t first = plan.pieces.size();
        add(t, begin, std::min(t.rows, begin + rows));
        read(first, plan.pieces.back().extent);
      }
      ++i;
      continue;
    }
    // As many of the next tensors as lie together are joined.
    std::vector<Extent> together{t.extent};
    Extent extent = t.extent;
    size_t last = i + 1;
    int64_t total = static_cast<int64_t>(t.extent.bytes);
    for (size_t j = i + 1; j < order.size(); ++j) {
      total += static_cast<int64_t>(order[j].extent.bytes);
      if (total > bytes) break;
      together.push_back(order[j].extent);
      const Extent all = joined(together);
      if (all.bytes == 0 || all.bytes > static_cast<uint64_t>(bytes)) continue;
      extent = all;
      last = j + 1;
    }
    const size_t first = plan.pieces.size();
    for (; i < last; ++i) add(order[i], 0, order[i].rows);
    read(first, extent);
  }
}

}  // namespace

int64_t page_span(const Extent& e) {
  const uint64_t begin = e.offset / kIoAlign * kIoAlign;
  return static_cast<int64_t>((e.offset + e.bytes + kIoAlign - 1) / kIoAlign * kIoAlign - begin);
}

StreamPlan plan_stream(const std::vector<StreamTensor>& order, int64_t room) {
  StreamPlan plan;
  plan.active = true;
  int64_t all = 0;
  for (const StreamTensor& t : order) {
    all += page_span(t.extent);
    plan.whole.push_back(t.tensor);
  }
  std::sort(plan.whole.begin(), plan.whole.end());
  // A ring as large as the weights would stream nothing.
  const int64_t least = std::max(kLeastRing, 4 * largest_span(order, kLeastRead));
  if (all <= std::max(room, least)) return plan;

  const int64_t wanted = std::min(kMostRing, best_ring(all - std::max<int64_t>(room, 0)));
  plan.ring_bytes = std::max(least, std::min(room, wanted));
  StreamPlan cuts;
  cut(order, std::clamp(plan.ring_bytes / kRingReads, kLeastRead, kMostRead), cuts);
  // Pinned weights are stored tensor by tensor.
  const auto memory = [&](const StreamRead& r) {
    int64_t bytes = 0;
    for (int32_t i = r.first; i < r.last; ++i) {
      bytes += page_span(cuts.pieces[static_cast<size_t>(i)].extent);
    }
    return bytes;
  };
  int64_t total = 0;
  for (const StreamRead& r : cuts.reads) total += memory(r);
  // Every read earns its share of the room; a read that has earned its size is pinned and spends
  // it.
  const double share = static_cast<double>(std::max<int64_t>(0, room - plan.ring_bytes)) /
                       static_cast<double>(total);
  int64_t earned = 0;
  std::set<int32_t> streamed;  // tensors with at least one streamed read
  for (StreamRead& r : cuts.reads) {
    const int64_t span = memory(r);
    earned += static_cast<int64_t>(static_cast<double>(span) * share);
    r.pinned = earned >= span;
    if (r.pinned) earned -= span;
    for (int32_t i = r.first; i < r.last && !r.pinned; ++i) {
      streamed.insert(cuts.pieces[static_cast<size_t>(i)].tensor);
    }
  }
  const auto is_streamed = [&](int32_t tensor) { return streamed.count(tensor) > 0; };
  plan.whole.erase(std::remove_if(plan.whole.begin(), plan.whole.end(), is_streamed),
                   plan.whole.end());
  for (StreamRead r : cuts.reads) {
    if (!is_streamed(cuts.pieces[static_cast<size_t>(r.first)].tensor)) continue;
    (r.pinned ? plan.pinned_bytes : plan.streamed_bytes) += page_span(r.extent);
    const auto first = static_cast<int32_t>(plan.pieces.size());
    for (int32_t i = r.first; i < r.last; ++i) {
      plan.pieces.push_back(cuts.pieces[static_cast<size_t>(i)]);
      plan.pieces.back().read = static_cast<int32_t>(plan.reads.size());
    }
    r.first = first;
    r.last = static_cast<int32_t>(plan.pieces.size());
    plan.reads.push_back(r);
  }
  return plan;
}

int64_t lend_to_pinned(StreamPlan& plan, int64_t bytes) {
  int64_t total = 0, lent = 0, earned = 0;
  for (const StreamRead& r : plan.reads) total += r.pinned ? 0 : page_span(r.extent);
  if (total == 0 || bytes <= 0) return 0;
  const double share = std::min(1.0, static_cast<double>(bytes) / static_cast<double>(total));
  std::vector<int32_t> chosen;
  for (size_t i = 0; i < plan.reads.size(); ++i) {
    if (plan.reads[i].pinned) continue;
    const int64_t span = page_span(plan.reads[i].extent);
    earned += static_cast<int64_t>(std::ceil(static_cast<double>(span) * share));
    if (earned < span || lent + span > bytes) continue;
    earned -= span;
    lent += span;
    chosen.push_back(static_cast<int32_t>(i));
  }
  // In the order of their numbers' bits reversed.
  size_t size = 1;
  while (size < chosen.size()) size *= 2;
  for (size_t i = 0; i < size; ++i) {
    size_t reversed = 0;
    for (size_t bit = 1, other = size / 2; bit < size; bit *= 2, other /= 2) {
      if (i & bit) reversed |= other;
    }
    if (reversed < chosen.size()) plan.lent.push_back(chosen[reversed]);
  }
  return lent;
}

}  // namespace stoker
