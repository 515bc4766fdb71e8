#include "offload/pools/cache.h"

#include <algorithm>
#include <numeric>

namespace stoker {

std::vector<int64_t> Cache::plan_slots(const Layout& layout, int64_t bytes, int64_t experts_used) {
  const std::vector<int64_t>& size = layout.class_bytes();
  const std::vector<int64_t>& units = layout.class_units();
  std::vector<int64_t> slots(size.size());
  int64_t used = 0, others = 0;  // bytes of the rings, and of the units beyond them
  for (size_t c = 0; c < size.size(); ++c) {
    slots[c] = ring_slots(units[c], experts_used);
    used += slots[c] * size[c];
    others += (units[c] - slots[c]) * size[c];
  }
  const int64_t rest = std::min(std::max<int64_t>(0, bytes - used), others);
  for (size_t c = 0; c < size.size() && others > 0; ++c) {
    const int64_t more = rest * (units[c] - slots[c]) / others;
    slots[c] += more;
    used += more * size[c];
  }
  // The bytes that rounding left go to the large slots first.
  for (size_t c = size.size(); c-- > 0;) {
    while (slots[c] < units[c] && used + size[c] <= bytes) {
      ++slots[c];
      used += size[c];
    }
  }
  return slots;
}

Cache::Cache(const Layout& layout, std::vector<int64_t> slots, std::unique_ptr<Policy> policy)
    : layout_(layout), policy_(std::move(policy)) {
  uint64_t bytes = 0;
  int64_t count = 0;
  for (size_t c = 0; c < slots.size(); ++c) {
    bytes += static_cast<uint64_t>(slots[c] * layout.class_bytes()[c]);
    count += slots[c];
  }
  arena_ = HugeMemory(bytes, "expert cache");
  slots_ = std::vector<Slot>(static_cast<size_t>(count));
  slot_of_.assign(static_cast<size_t>(layout.n_units()), -1);
  free_.resize(slots.size());
  candidates_.reserve(static_cast<size_t>(count));
  uint8_t* at = arena_.data();
  int32_t s = 0;
  for (size_t c = 0; c < slots.size(); ++c) {
    range_.emplace_back(s, s + static_cast<int32_t>(slots[c]));
    for (int64_t i = 0; i < slots[c]; ++i, ++s) {
      slots_[static_cast<size_t>(s)].data = at;
      slots_[static_cast<size_t>(s)].size_class = static_cast<int>(c);
      at += layout.class_bytes()[c];
    }
    // Free slots are taken from the back, so that the arena is filled from its start.
    for (int32_t k = range_.back().second; k-- > range_.back().first;) free_[c].push_back(k);
  }
}

Cache::Slot* Cache::take(UnitId unit, int64_t step, bool force) {
  const size_t c = static_cast<size_t>(layout_.size_class(unit));
  int32_t s = -1;
  if (!free_[c].empty()) {
    s = free_[c].back();
    free_[c].pop_back();
  } else {
    const auto gather = [&](int64_t kept) {
      candidates_.clear();
      for (int32_t k = range_[c].first; k < range_[c].second; ++k) {
        const Slot& slot = slots_[static_cast<size_t>(k)];
        const bool leaves = kept > 0 ? slot.keep >= kept : slot.keep <= step;
        if (slot.pins == 0 && leaves) candidates_.push_back(slot.unit);
      }
    };
    gather(0);
    if (candidates_.empty() && force) {
      // Among the units kept for later, those that are needed last are candidates.
      int64_t last = 0;
      for (int32_t k = range_[c].first; k < range_[c].second; ++k) {
        const Slot& slot = slots_[static_cast<size_t>(k)];
        if (slot.pins == 0) last = std::max(last, slot.keep);
      }
      gather(last);
    }
    if (candidates_.empty()) return nullptr;
    const UnitId leaves = candidates_[policy_->victim(candidates_)];
    s = slot_of_[static_cast<size_t>(leaves)];
    slot_of_[static_cast<size_t>(leaves)] = -1;
    policy_->erase(leaves);
    ++evictions_;
  }
  Slot& slot = slots_[static_cast<size_t>(s)];
  slot.unit = unit;
  slot.keep = 0;
  slot_of_[static_cast<size_t>(unit)] = s;
  policy_->insert(unit);
  return &slot;
}

int64_t Cache::n_slots(int size_class) const {
  const auto [first, last] = range_[static_cast<size_t>(size_class)];
  const auto lent = std::count_if(lent_.begin(), lent_.end(), [&](int32_t s) {
    return slots_[static_cast<size_t>(s)].size_class == size_class;
  });
  return last - first - lent;
}

int64_t Cache::lend(int64_t bytes, const std::vector<int64_t>& least) {
  // Slots are taken from the end of each class, the class with the most memory first, so that the
  // rest stays in proportion and in one piece.
  std::vector<int32_t> chosen;
  std::vector<int64_t> left(range_.size());
  for (size_t c = 0; c < range_.size(); ++c) {
    left[c] = range_[c].second - range_[c].first;
  }
  for (int32_t s : lent_) --left[static_cast<size_t>(slots_[static_cast<size_t>(s)].size_class)];
  std::vector<int32_t> next;
  for (const auto& r : range_) next.push_back(r.second);
  int64_t total = 0;
  while (total < bytes) {
    int best = -1;
    for (size_t c = 0; c < range_.size(); ++c) {
      while (next[c] > range_[c].first && slots_[static_cast<size_t>(next[c] - 1)].pins > 0)
        --next[c];
      if (left[c] <= least[c] || next[c] <= range_[c].first) continue;
      if (best < 0 ||
          left[c] * layout_.class_bytes()[c] >
              left[static_cast<size_t>(best)] * layout_.class_bytes()[static_cast<size_t>(best)]) {
        best = static_cast<int>(c);
      }
    }
    if (best < 0) return 0;
    const size_t c = static_cast<size_t>(best);
    chosen.push_back(--next[c]);
    --left[c];
    total += layout_.class_bytes()[c];
  }
  for (int32_t s : chosen) {
    Slot& slot = slots_[static_cast<size_t>(s)];
    if (slot.unit >= 0) drop(slot);
    std::erase(free_[static_cast<size_t>(slot.size_class)], s);
    slot.pins = 1;  // a pin without an owner: neither free nor a candidate
    arena_.release(slot.data, static_cast<uint64_t>(
                                  layout_.class_bytes()[static_cast<size_t>(slot.size_class)]));
    lent_.push_back(s);
  }
  return total;
}

int64_t Cache::take_back(int64_t bytes) {
  int64_t total = 0;
  while (!lent_.empty()) {
    Slot& slot = slots_[static_cast<size_t>(lent_.back())];
    const size_t c = static_cast<size_t>(slot.size_class);
    if (total + layout_.class_bytes()[c] > bytes) break;
    total += layout_.class_bytes()[c];
    slot.pins = 0;
    free_[c].push_back(lent_.back());
    lent_.pop_back();
  }
  return total;
}

void Cache::drop(Slot& slot) {
  policy_->erase(slot.unit);
  slot_of_[static_cast<size_t>(slot.unit)] = -1;
  slot.unit = -1;
  const int32_t s = static_cast<int32_t>(&slot - slots_.data());
  free_[static_cast<size_t>(slot.size_class)].push_back(s);
}

}  // namespace stoker
