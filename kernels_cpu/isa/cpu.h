// The processor: its name, its cores, and the instruction sets that it was seen to execute.
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
  // An Isa is true where it is compiled in, announced by the processor and enabled by the operating
  // system, and a few of its instructions have run without a trap. On some virtual machines a flag
  // is set and the instruction still traps, so that the flags alone prove nothing.
  bool executes[kIsaCount] = {};
};

// Returns what the first call finds; any thread may call it.
const Cpu& cpu();

// Returns the threads that a compute pool has by default: the performance cores, within the quota.
int default_threads();

}  // namespace stoker
