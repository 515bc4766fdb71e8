// From a budget to a plan: what of it is fixed, and how many expert slots the rest holds.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "offload/units/layout.h"

namespace stoker {

// Bytes of a process that runs a model inside a budget.
struct MemoryPlan {
  int64_t budget = 0;   // 0: none was named, everything is resident
  int64_t process = 0;  // interpreter and libraries, measured before the load
  int64_t pinned = 0;   // attention, norms, routers, embeddings, output
  int64_t ring = 0;     // that the others of them pass through where not all fit
  int64_t kv = 0;       // of one session at its full context
  int64_t scratch = 0;
  int64_t margin = 0;
  std::vector<int64_t> slots;  // of each size class, where sequences have all of theirs
  std::vector<int64_t> first_slots;  // at the start, when they have nothing yet
  int64_t slot_bytes = 0;      // of all slots
  int64_t expert_bytes = 0;    // of all experts of the model
  int64_t n_slots = 0, n_units = 0;
  int64_t working_set = 0;  // experts that one token uses
  // Fewer slots than one token uses: layers pass through a small ring, little is reused.
  bool streams() const { return n_slots < working_set; }
};

// What is not experts, bytes.
struct FixedMemory {
  int64_t process = 0, pinned = 0, ring = 0, kv = 0, scratch = 0;
  // What the process may be larger by in the next run: it never has quite the same size twice.
  int64_t process_varies = 0;
  int64_t total() const { return process + pinned + ring + kv + scratch; }
};

// Bytes of so many slots of each size class.
int64_t bytes_of(const Layout& layout, const std::vector<int64_t>& slots);

// Bytes of the fewest slots that work.
int64_t least_slot_bytes(const Layout& layout, int64_t experts_used);

// The smallest budget that would do.
int64_t least_memory(const FixedMemory& fixed, const Layout& layout, int64_t experts_used);

// Throws Error(kBudget), naming a budget that is enough in the next run, too.
MemoryPlan plan_memory(const std::string& path, int64_t budget, const FixedMemory& fixed,
                       const Layout& layout, int64_t working_set, int64_t experts_used);

// The same plan with as few slots as work: what a runtime without a cache of experts has.
MemoryPlan ring_only(MemoryPlan plan, const Layout& layout, int64_t experts_used);

// The margin of a budget: page tables, stacks, allocators, the interpreter's growth.
int64_t memory_margin(int64_t budget);

}  // namespace stoker
