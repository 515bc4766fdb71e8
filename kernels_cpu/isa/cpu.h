// What the processor is and what it can be seen to execute.
#pragma once

#include <string>

#include "kernels_cpu/kernel.h"

namespace stoker {

struct Cpu {
  std::string name;  // as the processor or the operating system gives it
  // CPUs that this process may run on (its affinity mask), the distinct cores among them, and the
  // cores among those that belong to the fastest class (all of them where there is one class).
  int logical = 1;
  int physical = 1;
  int performance = 1;
  // CPUs' worth of time that the control group grants, rounded up; 0 where it sets no limit.
  int quota = 0;
  // Per Isa: compiled in, announced by the processor, enabled by the operating system, and a few
  // instructions of it have run without a trap. On some virtual machines a flag is set and the
  // instruction still traps, so that the flags alone prove nothing.
  bool executes[kIsaCount] = {};
};

// Found once, at the first call; safe to call from any thread.
const Cpu& cpu();

// Threads that a compute pool should have by default: the performance cores, within the quota.
int default_threads();

}  // namespace stoker
