#include "offload/plan/planner.h"

#include <algorithm>
#include <cstdio>

#include "offload/pools/cache.h"
#include "runtime/base/errors.h"

namespace stoker {

namespace {

std::string mib(int64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%lld MiB",
                static_cast<long long>((bytes + (1 << 20) - 1) >> 20));
  return text;
}

// Page tables, stacks and allocators take this much, or this part of a large budget.
constexpr int64_t kLeastMargin = int64_t{12} << 20;
constexpr int64_t kMarginShare = 64;

// Returns the smallest budget that leaves `bytes` after its margin.
int64_t with_margin(int64_t bytes) {
  int64_t budget = bytes + kLeastMargin;
  while (budget - memory_margin(budget) < bytes) budget += bytes - (budget - memory_margin(budget));
  return budget;
}

void set_slots(MemoryPlan& p, const Layout& layout, std::vector<int64_t> slots) {
  p.slots = std::move(slots);
  p.n_slots = p.slot_bytes = 0;
  for (size_t c = 0; c < p.slots.size(); ++c) {
    p.n_slots += p.slots[c];
    p.slot_bytes += p.slots[c] * layout.class_bytes()[c];
  }
}

}  // namespace

int64_t memory_margin(int64_t budget) { return std::max(kLeastMargin, budget / kMarginShare); }

int64_t bytes_of(const Layout& layout, const std::vector<int64_t>& slots) {
  int64_t bytes = 0;
  for (size_t c = 0; c < slots.size(); ++c) bytes += slots[c] * layout.class_bytes()[c];
  return bytes;
}

int64_t least_slot_bytes(const Layout& layout, int64_t experts_used) {
  int64_t least = 0;
  for (size_t c = 0; c < layout.class_bytes().size(); ++c) {
    least += ring_slots(layout.class_units()[c], experts_used) * layout.class_bytes()[c];
  }
  return least;
}

int64_t least_memory(const FixedMemory& f, const Layout& layout, int64_t experts_used) {
  return with_margin(f.total() + least_slot_bytes(layout, experts_used));
}

MemoryPlan plan_memory(const std::string& path, int64_t budget, const FixedMemory& fixed,
                       const Layout& layout, int64_t working_set, int64_t experts_used) {
  MemoryPlan p;
  p.budget = budget;
  p.process = fixed.process;
  p.pinned = fixed.pinned;
  p.ring = fixed.ring;
  p.kv = fixed.kv;
  p.scratch = fixed.scratch;
  p.margin = memory_margin(budget);
  p.working_set = working_set;
  const int64_t least = least_slot_bytes(layout, experts_used);
  int64_t all = 0;
  for (size_t c = 0; c < layout.class_bytes().size(); ++c) {
    const int64_t units = layout.class_units()[c];
    all += units * layout.class_bytes()[c];
    p.n_units += units;
  }
  for (UnitId u = 0; u < static_cast<UnitId>(layout.n_units()); ++u) {
    if (layout.has(u)) p.expert_bytes += layout.nbytes(u);
  }
  const int64_t taken = fixed.total();
  if (budget - p.margin - taken < least) {
    FixedMemory next = fixed;
    next.process += fixed.process_varies;
    const int64_t minimum = least_memory(next, layout, experts_used);
    throw Error(ErrorKind::kBudget,
                path + ": memory: expected at least " + std::to_string(minimum) + " bytes (" +
                    mib(minimum) + "), found " + std::to_string(budget) + " (process " +
                    mib(p.process) + ", pinned weights " + mib(p.pinned) + ", KV cache " +
                    mib(p.kv) + ", scratch " + mib(p.scratch) + ", margin " +
                    mib(memory_margin(minimum)) +
                    (p.ring > 0 ? ", a ring for streamed weights " + mib(p.ring) : "") +
                    (least > 0 ? ", experts at least " + mib(least) : "") +
                    "); a smaller context needs less");
  }
  set_slots(p, layout,
            Cache::plan_slots(layout, std::min(budget - p.margin - taken, all), experts_used));
  return p;
}

MemoryPlan ring_only(MemoryPlan plan, const Layout& layout, int64_t experts_used) {
  std::vector<int64_t> slots;
  for (size_t c = 0; c < layout.class_units().size(); ++c) {
    slots.push_back(std::min(plan.slots[c], ring_slots(layout.class_units()[c], experts_used)));
  }
  set_slots(plan, layout, std::move(slots));
  return plan;
}

}  // namespace stoker
