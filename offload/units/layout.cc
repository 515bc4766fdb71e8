#include "offload/units/layout.h"

#include <algorithm>

namespace stoker {

namespace {

// Extents closer than this are read as one: the bytes between them cost less than another read.
constexpr uint64_t kMergeGap = 64 * 1024;
// Slot sizes within this share of each other become one: this loses a few bytes, but the cache can
// move its slots between layers.
constexpr double kSameClass = 0.04;

uint64_t page_down(uint64_t n) { return n / kIoAlign * kIoAlign; }
uint64_t page_up(uint64_t n) { return (n + kIoAlign - 1) / kIoAlign * kIoAlign; }

}  // namespace

Layout::Layout(int64_t n_layer, int64_t n_expert)
    : n_layer_(n_layer), n_expert_(n_expert), units_(static_cast<size_t>(n_layer * n_expert)) {}

void Layout::add(int64_t layer, int64_t expert, const Parts& parts) {
  Unit& u = units_[static_cast<size_t>(unit(layer, expert))];
  std::array<int, 3> order{0, 1, 2};
  std::sort(order.begin(), order.end(), [&](int a, int b) {
    const Extent& x = parts[static_cast<size_t>(a)].extent;
    const Extent& y = parts[static_cast<size_t>(b)].extent;
    return x.shard != y.shard ? x.shard < y.shard : x.offset < y.offset;
  });
  uint64_t slot = 0;  // bytes of the slot given out so far
  for (int i : order) {
    const Part& p = parts[static_cast<size_t>(i)];
    const Extent& e = p.extent;
    u.matrices[static_cast<size_t>(i)] = p.matrix;
    u.weight_bytes += static_cast<int64_t>(e.bytes);
    const uint64_t end = e.offset + e.bytes;
    if (u.n_reads > 0) {
      Read& last = u.reads[static_cast<size_t>(u.n_reads - 1)];
      if (last.file == e.shard && e.offset <= last.offset + last.needed + kMergeGap) {
        last.needed = std::max(last.needed, end - last.offset);
        last.bytes = page_up(last.needed);
        const uint64_t base = u.read_at[static_cast<size_t>(u.n_reads - 1)];
        u.at[static_cast<size_t>(i)] = base + (e.offset - last.offset);
        slot = base + last.bytes;
        continue;
      }
    }
    Read& r = u.reads[static_cast<size_t>(u.n_reads)];
    r.file = e.shard;
    r.offset = page_down(e.offset);
    r.needed = end - r.offset;
    r.bytes = page_up(r.needed);
    u.read_at[static_cast<size_t>(u.n_reads)] = slot;
    u.at[static_cast<size_t>(i)] = slot + (e.offset - r.offset);
    slot += r.bytes;
    ++u.n_reads;
  }
  u.slot_bytes = static_cast<int64_t>(slot);
  for (int i = 0; i < u.n_reads; ++i) {
    u.read_bytes += static_cast<int64_t>(u.reads[static_cast<size_t>(i)].bytes);
  }
}

void Layout::finish() {
  std::vector<int64_t> sizes;
  for (const Unit& u : units_) {
    if (u.n_reads > 0) sizes.push_back(u.slot_bytes);
  }
  std::sort(sizes.begin(), sizes.end(), std::greater<>());
  class_bytes_.clear();
  for (int64_t s : sizes) {
    if (class_bytes_.empty() ||
        static_cast<double>(s) < (1 - kSameClass) * static_cast<double>(class_bytes_.back())) {
      class_bytes_.push_back(s);
    }
  }
  std::reverse(class_bytes_.begin(), class_bytes_.end());
  class_units_.assign(class_bytes_.size(), 0);
  for (Unit& u : units_) {
    if (u.n_reads == 0) continue;
    const auto it = std::lower_bound(class_bytes_.begin(), class_bytes_.end(), u.slot_bytes);
    u.size_class = static_cast<int>(it - class_bytes_.begin());
    ++class_units_[static_cast<size_t>(u.size_class)];
  }
}

void Layout::prepare(UnitId id, uint8_t* slot, IoJob& job) const {
  const Unit& u = at(id);
  job.n_reads = u.n_reads;
  job.tag = static_cast<uint64_t>(id);
  for (int i = 0; i < u.n_reads; ++i) {
    const size_t k = static_cast<size_t>(i);
    job.reads[k] = u.reads[k];
    job.reads[k].into = slot + u.read_at[k];
  }
}

Expert Layout::view(UnitId id, const uint8_t* slot) const {
  const Unit& u = at(id);
  Expert e{u.matrices[0], u.matrices[1], u.matrices[2]};
  e.gate.data = slot + u.at[0];
  e.up.data = slot + u.at[1];
  e.down.data = slot + u.at[2];
  return e;
}

}  // namespace stoker
