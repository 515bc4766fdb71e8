// The slots that hold units in memory: one aligned arena, a directory, pins, and the policy that
// says who leaves. It reads nothing itself. Used by one thread at a time.
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

// The fewest slots with which a layer of `units` units runs: a token's experts, and half as many
// being read ahead.
inline int64_t ring_slots(int64_t units, int64_t experts_used) {
  return std::min(units, experts_used + (experts_used + 1) / 2);
}

class Cache {
 public:
  struct Slot {
    UnitId unit = -1;         // -1: free
    int32_t pins = 0;         // in use by a lease, or being read
    int64_t keep = 0;         // not evicted before the forward pass's step `keep`, if others can be
    bool prefetched = false;  // and not used since
    uint8_t* data = nullptr;
    int size_class = 0;
    IoJob job;
  };

  // slots: of each size class of the layout.
  Cache(const Layout& layout, std::vector<int64_t> slots, std::unique_ptr<Policy> policy);

  // The slots that `bytes` hold: of each size class the ring (ring_slots), whatever it takes; of
  // the rest, in proportion to its units.
  static std::vector<int64_t> plan_slots(const Layout& layout, int64_t bytes, int64_t experts_used);

  Slot* find(UnitId unit) {
    const int32_t s = slot_of_[static_cast<size_t>(unit)];
    return s < 0 ? nullptr : &slots_[static_cast<size_t>(s)];
  }
  // A slot for a unit that has none: a free one, or an unpinned one whose unit leaves. Slots with
  // keep > step are taken only where `force`. Null where there is none.
  Slot* take(UnitId unit, int64_t step, bool force);
  // The slot's unit leaves (a read that failed or was cancelled).
  void drop(Slot& slot);

  // Gives up free or unpinned slots until their memory is at least `bytes`, which goes back to the
  // system; each size class keeps `least` of them. Returns the bytes, or 0 and changes nothing
  // where there are too few. No unit may be in use.
  int64_t lend(int64_t bytes, const std::vector<int64_t>& least);
  // Takes back slots of at most `bytes`. Returns their bytes.
  int64_t take_back(int64_t bytes);

  Policy& policy() { return *policy_; }
  std::span<Slot> slots() { return slots_; }
  std::span<const Slot> slots() const { return slots_; }
  // Whether a unit of this size needs nobody's place.
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
  std::vector<std::vector<int32_t>> free_;          // by size class
  std::vector<int32_t> lent_;                       // slots without memory, latest last
  std::vector<UnitId> candidates_;                  // of victim()
  std::vector<std::pair<int32_t, int32_t>> range_;  // of each class: slots [first, last)
  int64_t evictions_ = 0;
};

}  // namespace stoker
