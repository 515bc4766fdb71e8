// Cache holds the slots that keep units in memory: one aligned arena, a directory, pins, and the
// policy that chooses which unit is evicted. It reads nothing itself. One thread uses it at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "offload/units/layout.h"
#include "offload/policy/policy.h"
#include "runtime/base/memory.h"

namespace stoker {

// Returns the fewest slots with which a layer of `units` units runs: a token's experts, and half as
// many for reads ahead.
inline int64_t ring_slots(int64_t units, int64_t experts_used) {
  return std::min(units, experts_used + (experts_used + 1) / 2);
}

class Cache {
 public:
  struct Slot {
    UnitId unit = -1;         // -1: free
    int32_t pins = 0;         // in use by a lease, or being read
    int64_t keep = 0;         // not evicted before the forward pass's step `keep`, if others can be
    bool prefetched = false;  // prefetched and not used since
    uint8_t* data = nullptr;
    int size_class = 0;
    IoJob job;
  };

  // slots: the number for each size class of the layout.
  Cache(const Layout& layout, std::vector<int64_t> slots, std::unique_ptr<Policy> policy);

  // Returns how many slots fit in `bytes`: for each size class the ring (ring_slots), whatever it
  // takes; the rest of the bytes is shared in proportion to the units.
  static std::vector<int64_t> plan_slots(const Layout& layout, int64_t bytes, int64_t experts_used);

  Slot* find(UnitId unit) {
    const int32_t s = slot_of_[static_cast<size_t>(unit)];
    return s < 0 ? nullptr : &slots_[static_cast<size_t>(s)];
  }
  // Takes a slot for a unit that has none: a free one, or an unpinned one whose unit is evicted.
  // Slots with keep > step are taken only where `force`. Returns null where there is none.
  Slot* take(UnitId unit, int64_t step, bool force);
  // Frees the slot of a unit whose read failed or was cancelled.
  void drop(Slot& slot);

  // Gives up free or unpinned slots until their memory, which is released to the system, is at
  // least `bytes`; each size class keeps `least` slots. Returns the bytes, or returns 0 and changes
  // nothing where there are too few slots. No unit may be in use.
  int64_t lend(int64_t bytes, const std::vector<int64_t>& least);
  // Takes back slots of at most `bytes`. Returns their bytes.
  int64_t take_back(int64_t bytes);

  Policy& policy() { return *policy_; }
  std::span<Slot> slots() { return slots_; }
  std::span<const Slot> slots() const { return slots_; }
  // Whether a unit of this size class can be placed without an eviction.
  bool has_free(UnitId unit) const {
    return !free_[static_cast<size_t>(layout_.size_class(unit))].empty();
  }
  int64_t n_slots() const { return static_cast<int64_t>(slots_.size() - lent_.size()); }
  int64_t n_slots(int size_class) const;
  int64_t evictions() const { return evictions_; }

 private:
  const Layout& layout_;
  std::unique_ptr<Policy> policy_;
  HugeMemory arena_;
  std::vector<Slot> slots_;
  std::vector<int32_t> slot_of_;                    // [n_units], -1: not resident
  std::vector<std::vector<int32_t>> free_;          // free slots by size class
  std::vector<int32_t> lent_;                       // slots without memory, latest last
  std::vector<UnitId> candidates_;                  // scratch for victim()
  std::vector<std::pair<int32_t, int32_t>> range_;  // slots [first, last) of each class
  int64_t evictions_ = 0;
};

}  // namespace stoker
