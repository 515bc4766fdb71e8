// Facts about the machine and this process from Linux and Android. Each is empty or -1 if the
// system does not tell: phones hide many of them.
#pragma once

#include <cstdint>
#include <string>

namespace stoker::bench {

int64_t meminfo_bytes(const char* key);  // "MemTotal:"
int64_t group_limit_bytes();             // limit of the memory control group; -1: none
int64_t resident_bytes();                // current, of this process
int64_t peak_bytes();                    // largest so far, of this process
double hottest_celsius();                // the hottest thermal zone; NaN: none readable
// Whether a core's clock is capped below its highest, for example by heat: 1 or 0; -1: unknown.
int throttled();
// The fastest core's current clock over its highest; NaN: unknown.
double clock_share();
std::string utc_now();  // ISO 8601

// CPU seconds: of all CPUs since boot (total, worked, steal), and of this process (own).
struct CpuTime {
  double total = 0, worked = 0, steal = 0, own = 0;
  bool known = false;
};
CpuTime cpu_time();

}  // namespace stoker::bench
