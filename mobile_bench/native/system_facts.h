// What Linux and Android tell of the machine and of this process. Each is empty or -1 where the
// system does not tell: phones hide much of it.
#pragma once

#include <cstdint>
#include <string>

namespace stoker::bench {

int64_t meminfo_bytes(const char* key);  // "MemTotal:"
int64_t group_limit_bytes();             // of the memory control group; -1: none
int64_t resident_bytes();                // of this process, now
int64_t peak_bytes();                    // of this process, so far
double hottest_celsius();                // of the thermal zones; NaN: none readable
// Whether a core's clock is held below what it can do, as heat does: 1 or 0; -1: not told.
int throttled();
// The fastest core's clock now, of its highest; NaN: not told.
double clock_share();
std::string utc_now();  // ISO 8601

// Seconds of all CPUs since the start of the system, and of this process.
struct CpuTime {
  double total = 0, worked = 0, steal = 0, own = 0;
  bool known = false;
};
CpuTime cpu_time();

}  // namespace stoker::bench
