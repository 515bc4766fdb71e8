// Where experts lie in files and slots, and which slots there are.
#include "offload/pools/cache.h"

#include <algorithm>
#include <array>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "offload/policy/policy.h"
#include "tests/native/io_fixture.h"
#include "tests/native/layout_fixture.h"

namespace {

using namespace io_fixture;
using layout_fixture::part;
using stoker::Cache;
using stoker::Expert;
using stoker::Extent;
using stoker::Layout;
using stoker::Matrix;
using stoker::UnitId;

// An expert through a real read into a slot is the file's bytes.
void check_unit(const Files& files, IoBackend& io, const Layout& layout, UnitId u,
                const std::array<Extent, 3>& extents, const std::string& what) {
  const uint64_t room =
      static_cast<uint64_t>(layout.class_bytes()[static_cast<size_t>(layout.size_class(u))]);
  auto* slot = static_cast<uint8_t*>(::operator new(room + kIoAlign, std::align_val_t(kIoAlign)));
  std::memset(slot, 0x5a, room + kIoAlign);
  IoJob job;
  layout.prepare(u, slot, job);
  int64_t bytes = 0;
  for (int i = 0; i < job.n_reads; ++i) {
    const stoker::Read& r = job.reads[static_cast<size_t>(i)];
    bytes += static_cast<int64_t>(r.bytes);
    check(r.into >= slot && r.into + r.bytes <= slot + room, what + ": reads stay in the slot");
    for (int j = 0; j < i; ++j) {
      const stoker::Read& other = job.reads[static_cast<size_t>(j)];
      check(r.into >= other.into + other.bytes || other.into >= r.into + r.bytes,
            what + ": reads do not overlap");
    }
  }
  check(bytes == layout.read_bytes(u), what + ": read_bytes");
  io.submit(job, true);
  while (job.status.load(std::memory_order_acquire) == IoStatus::kPending) {
    std::this_thread::yield();
  }
  check(job.status.load() == IoStatus::kDone, what + ": read: " + job.error);
  const Expert e = layout.view(u, slot);
  const Matrix* matrices[] = {&e.gate, &e.up, &e.down};
  for (size_t i = 0; i < 3; ++i) {
    const auto& file = *files[static_cast<size_t>(extents[i].shard)];
    check(file.same(matrices[i]->data, extents[i].offset, extents[i].bytes),
          what + ": matrix " + std::to_string(i));
  }
  for (uint64_t i = 0; i < kIoAlign; ++i) {
    if (slot[room + i] != 0x5a) {
      check(false, what + ": written beyond the slot");
      break;
    }
  }
  ::operator delete(slot, std::align_val_t(kIoAlign));
}

void test_layouts(const Files& files) {
  const std::unique_ptr<IoBackend> io = open(files, "pread_pool", 2);
  std::mt19937_64 random(3);
  bool joined = false, apart = false, several = false;
  for (int round = 0; round < 60; ++round) {
    const int64_t n_layer = 1 + static_cast<int64_t>(random() % 3);
    const int64_t n_expert = 1 + static_cast<int64_t>(random() % 6);
    Layout layout(n_layer, n_expert);
    std::vector<std::array<Extent, 3>> extents(static_cast<size_t>(n_layer * n_expert));
    std::vector<bool> added(extents.size());
    for (int64_t l = 0; l < n_layer; ++l) {
      if (l > 0 && random() % 4 == 0) continue;  // a dense layer
      for (int64_t e = 0; e < n_expert; ++e) {
        Layout::Parts parts;
        const size_t u = static_cast<size_t>(layout.unit(l, e));
        // Near each other, anywhere, or in several files; in any order; up to the last byte.
        const uint64_t kind = random() % 3;
        uint64_t at = random() % (1 << 20);
        for (size_t i = 0; i < 3; ++i) {
          const int64_t rows = 1 + static_cast<int64_t>(random() % 40);
          const int64_t stride = 18 * (1 + static_cast<int64_t>(random() % 12));
          const uint64_t n = static_cast<uint64_t>(rows * stride);
          int32_t file = 0;
          if (kind == 2) file = static_cast<int32_t>(random() % files.size());
          const uint64_t size = files[static_cast<size_t>(file)]->size();
          if (kind != 0) at = random() % 8 == 0 ? size - n : random() % (size - n);
          parts[i] = part(file, at, rows, stride);
          extents[u][i] = parts[i].extent;
          at += n + random() % 3000;
        }
        // Two parts of an expert never share bytes in a real file.
        bool overlap = false;
        for (size_t i = 0; i < 3; ++i) {
          for (size_t j = 0; j < i; ++j) {
            const Extent &a = extents[u][i], &b = extents[u][j];
            overlap |= a.shard == b.shard && a.offset < b.offset + b.bytes &&
                       b.offset < a.offset + a.bytes;
          }
        }
        if (overlap) {
          --e;
          continue;
        }
        layout.add(l, e, parts);
        added[u] = true;
      }
    }
    layout.finish();
    int64_t units = 0;
    for (size_t c = 0; c < layout.class_bytes().size(); ++c) {
      units += layout.class_units()[c];
      check(layout.class_bytes()[c] % static_cast<int64_t>(kIoAlign) == 0, "whole pages");
      check(c == 0 || layout.class_bytes()[c] > layout.class_bytes()[c - 1], "ascending");
    }
    several |= layout.class_bytes().size() > 1;
    check(units == std::count(added.begin(), added.end(), true), "every unit has a size");
    for (UnitId u = 0; u < static_cast<UnitId>(layout.n_units()); ++u) {
      const size_t k = static_cast<size_t>(u);
      check(layout.has(u) == added[k], "has()");
      if (!added[k]) continue;
      int64_t weights = 0;
      for (const Extent& e : extents[k]) weights += static_cast<int64_t>(e.bytes);
      check(layout.nbytes(u) == weights, "nbytes()");
      IoJob job;
      layout.prepare(u, nullptr, job);
      joined |= job.n_reads == 1;
      apart |= job.n_reads == 3;
      check_unit(files, *io, layout, u, extents[k],
                 "layout " + std::to_string(round) + " unit " + std::to_string(u));
    }
  }
  check(joined && apart && several, "layouts of every kind were tried");
}

void test_plan_slots() {
  std::mt19937_64 random(5);
  for (int round = 0; round < 300; ++round) {
    const int64_t n_expert = 1 + static_cast<int64_t>(random() % 40);
    const int64_t n_layer = 1 + static_cast<int64_t>(random() % 12);
    Layout layout(n_layer, n_expert);
    uint64_t at = 0;
    for (int64_t l = 0; l < n_layer; ++l) {
      const int64_t rows = int64_t{1} << (random() % 9);
      for (int64_t e = 0; e < n_expert; ++e) {
        Layout::Parts parts;
        for (auto& p : parts) {
          p = part(0, at, rows, 288);
          at += p.extent.bytes;
        }
        layout.add(l, e, parts);
      }
    }
    layout.finish();
    const int64_t used = 1 + static_cast<int64_t>(random() % static_cast<uint64_t>(n_expert));
    const std::vector<int64_t>& size = layout.class_bytes();
    const std::vector<int64_t>& units = layout.class_units();
    int64_t least = 0, all = 0;
    for (size_t c = 0; c < size.size(); ++c) {
      least += stoker::ring_slots(units[c], used) * size[c];
      all += units[c] * size[c];
    }
    for (const double share : {0.0, 0.001, 0.2, 0.5, 0.999, 1.0, 3.0}) {
      const int64_t bytes = least + static_cast<int64_t>(share * static_cast<double>(all - least));
      const std::vector<int64_t> slots = Cache::plan_slots(layout, bytes, used);
      int64_t total = 0, smallest_left = INT64_MAX;
      bool rings = true;
      for (size_t c = 0; c < size.size(); ++c) {
        total += slots[c] * size[c];
        rings &= slots[c] >= stoker::ring_slots(units[c], used) && slots[c] <= units[c];
        if (slots[c] < units[c]) smallest_left = std::min(smallest_left, size[c]);
      }
      check(total <= bytes || total == least, "slots fit");
      check(rings, "every size has its ring, and no more slots than units");
      check(bytes < all || total == all, "all of them where they fit");
      check(smallest_left > bytes - total, "nothing is left that a slot would fit into");
    }
  }
}

// Units of two sizes: layer 0 small, layer 1 large.
Layout two_sizes(int64_t n_expert) {
  Layout layout(2, n_expert);
  uint64_t at = 0;
  for (int64_t l = 0; l < 2; ++l) {
    for (int64_t e = 0; e < n_expert; ++e) {
      Layout::Parts parts;
      for (auto& p : parts) {
        p = part(0, at, l == 0 ? 16 : 64, 256);
        at += p.extent.bytes;
      }
      layout.add(l, e, parts);
    }
  }
  layout.finish();
  return layout;
}

void test_cache() {
  const Layout layout = two_sizes(4);
  check(layout.class_bytes().size() == 2, "two sizes of slots");
  Cache cache(layout, {2, 3}, stoker::make_policy("lru", {2, 4, 2}));
  const UnitId small[] = {layout.unit(0, 0), layout.unit(0, 1), layout.unit(0, 2)};
  const UnitId large = layout.unit(1, 0);
  Cache::Slot* a = cache.take(small[0], 1, false);
  Cache::Slot* b = cache.take(small[1], 1, false);
  check(a && b && a != b && cache.find(small[0]) == a, "slots are given");
  check(a->size_class == 0 && a->data != b->data, "of the unit's size");
  check(cache.take(large, 1, false)->size_class == 1, "of the larger size");
  a->pins = 1;
  b->pins = 1;
  check(!cache.take(small[2], 1, true), "pinned slots are not taken");
  b->pins = 0;
  b->keep = 5;
  check(!cache.take(small[2], 4, false), "kept slots are not taken before their step");
  check(cache.take(small[2], 4, true) == b, "unless they must be");
  check(!cache.find(small[1]) && cache.find(small[2]) == b && b->keep == 0, "the unit has left");
  check(cache.evictions() == 1, "evictions are counted");
  cache.drop(*b);
  check(!cache.find(small[2]) && cache.evictions() == 1, "a dropped unit is no eviction");
  check(cache.take(small[1], 1, false) == b, "its slot is free");
  a->pins = 0;

  // Lent slots leave the arena and come back.
  const int64_t sizes[] = {layout.class_bytes()[0], layout.class_bytes()[1]};
  check(cache.n_slots() == 5, "five slots");
  check(cache.lend(1 << 30, {1, 1}) == 0 && cache.n_slots() == 5, "too much is refused whole");
  const int64_t lent = cache.lend(sizes[1] + 1, {1, 1});
  check(lent == 2 * sizes[1] && cache.n_slots() == 3, "two large slots are lent");
  check(cache.take_back(sizes[1] - 1) == 0, "less than a slot does not come back");
  check(cache.take_back(2 * sizes[1]) == 2 * sizes[1] && cache.n_slots() == 5, "they come back");
  std::set<const uint8_t*> places;
  for (int32_t e = 0; e < 3; ++e) {
    Cache::Slot* slot = cache.find(layout.unit(1, e));
    if (!slot) slot = cache.take(layout.unit(1, e), 1, false);
    check(slot != nullptr, "and can be taken");
    std::memset(slot->data, e, static_cast<size_t>(sizes[1]));
    places.insert(slot->data);
  }
  check(places.size() == 3, "each in its place");
}

}  // namespace

int main() {
  {
    const Files files = three_files();
    test_layouts(files);
    test_plan_slots();
    test_cache();
  }
  return report("cache_test");
}
