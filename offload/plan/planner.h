// Turns a budget into a plan: how much of it is fixed, and how many expert slots fit the rest.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "offload/units/layout.h"

namespace stoker {

// The bytes of a process that runs a model inside a budget.
struct MemoryPlan {
  int64_t budget = 0;   // 0: none was named, everything is resident
  int64_t process = 0;  // interpreter and libraries, measured before the load
  int64_t pinned = 0;   // attention, norms, routers, embeddings, output
  int64_t ring = 0;     // the ring of the streamed weights, where not all are pinned
  int64_t kv = 0;       // KV cache of one session at its full context
  int64_t scratch = 0;
  int64_t margin = 0;
  std::vector<int64_t> slots;        // slots of each size class while every sequence page is in use
  std::vector<int64_t> first_slots;  // slots at the start, when no sequence page is in use
  int64_t slot_bytes = 0;            // bytes of all slots
  int64_t expert_bytes = 0;          // bytes of all experts of the model
  int64_t n_slots = 0, n_units = 0;
  int64_t working_set = 0;  // experts that one token uses
  // Whether there are fewer slots than one token uses: layers then stream through a small ring, and
  // little is reused.
  bool streams() const { return n_slots < working_set; }
};

// The memory that is not experts, bytes.
struct FixedMemory {
  int64_t process = 0, pinned = 0, ring = 0, kv = 0, scratch = 0;
  // How much larger the process may be in the next run, since its size varies between runs.
  int64_t process_varies = 0;
  int64_t total() const { return process + pinned + ring + kv + scratch; }
};

// Returns the bytes of so many slots of each size class.
int64_t bytes_of(const Layout& layout, const std::vector<int64_t>& slots);

// Returns the bytes of the fewest slots that work.
int64_t least_slot_bytes(const Layout& layout, int64_t experts_used);

// Returns the smallest budget that is enough.
int64_t least_memory(const FixedMemory& fixed, const Layout& layout, int64_t experts_used);

// Throws Error(kBudget), which names a budget that is also enough in the next run.
MemoryPlan plan_memory(const std::string& path, int64_t budget, const FixedMemory& fixed,
                       const Layout& layout, int64_t working_set, int64_t experts_used);

// Returns the same plan with as few slots as work, as in a runtime without an expert cache.
MemoryPlan ring_only(MemoryPlan plan, const Layout& layout, int64_t experts_used);

// Returns the margin of a budget: page tables, stacks, allocators, the interpreter's growth.
int64_t memory_margin(int64_t budget);

}  // namespace stoker
