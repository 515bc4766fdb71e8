#include "mobile_bench/native/system_facts.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <sstream>

#include "runtime/base/control_groups.h"
#include "runtime/base/system_file.h"

namespace stoker::bench {

namespace {

constexpr int kCpus = 64;  // CPUs that are looked at

std::string clock_folder(int cpu) {
  return "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/cpufreq/";
}

int64_t kib_line(const char* path, const std::string& key) {
  std::ifstream in(path);
  for (std::string line; std::getline(in, line);) {
    if (line.rfind(key, 0) == 0) return std::strtoll(line.c_str() + key.size(), nullptr, 10) * 1024;
  }
  return -1;
}

}  // namespace

int64_t meminfo_bytes(const char* key) { return kib_line("/proc/meminfo", key); }

int64_t group_limit_bytes() {
  int64_t least = -1;
  for (const ControlGroup& group : control_groups("memory")) {
    for (const char* name : {"/memory.max", "/memory.high", "/memory.limit_in_bytes"}) {
      const int64_t limit = first_number(group.folder + name);
      // Without a limit the file has "max", or a number above all memory.
      if (limit > 0 && limit < (int64_t{1} << 60)) {
        least = least < 0 ? limit : std::min(least, limit);
      }
    }
  }
  return least;
}

int64_t resident_bytes() {
  std::istringstream line(first_line("/proc/self/statm"));
  int64_t size = 0, resident = 0;
  if (!(line >> size >> resident)) return -1;
  return resident * sysconf(_SC_PAGESIZE);
}

int64_t peak_bytes() {
  const int64_t peak = kib_line("/proc/self/status", "VmHWM:");
  if (peak > 0) return peak;
  rusage usage = {};
  return getrusage(RUSAGE_SELF, &usage) == 0 ? int64_t{usage.ru_maxrss} * 1024 : -1;
}

double hottest_celsius() {
  double hottest = std::nan("");
  for (int i = 0; i < 128; ++i) {
    const std::string zone = "/sys/class/thermal/thermal_zone" + std::to_string(i) + "/temp";
    const int64_t milli = first_number(zone);
    // Zones that do not work report 0, -40 or the like.
    if (milli >= 1000 && milli < 150000)
      hottest = std::fmax(hottest, static_cast<double>(milli) / 1000);
  }
  return hottest;
}

int throttled() {
  bool known = false;
  for (int i = 0; i < kCpus; ++i) {
    const std::string clock = clock_folder(i);
    const int64_t allowed = first_number(clock + "scaling_max_freq");
    const int64_t best = first_number(clock + "cpuinfo_max_freq");
    if (allowed <= 0 || best <= 0) continue;
    if (allowed * 100 < best * 95) return 1;
    known = true;
  }
  return known ? 0 : -1;
}

double clock_share() {
  double share = std::nan("");
  for (int i = 0; i < kCpus; ++i) {
    const std::string clock = clock_folder(i);
    const int64_t now = first_number(clock + "scaling_cur_freq");
    const int64_t best = first_number(clock + "cpuinfo_max_freq");
    if (now <= 0 || best <= 0) continue;
    share = std::fmax(share, static_cast<double>(now) / static_cast<double>(best));
  }
  return share;
}

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  std::tm parts = {};
  gmtime_r(&now, &parts);
  char text[32];
  std::strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%SZ", &parts);
  return text;
}

CpuTime cpu_time() {
  // The fields are: cpu user nice system idle iowait irq softirq steal ...
  std::istringstream line(first_line("/proc/stat"));
  std::string name;
  int64_t ticks[8] = {};
  line >> name;
  for (int64_t& t : ticks) line >> t;
  CpuTime time;
  rusage usage = {};
  if (!line || name != "cpu" || getrusage(RUSAGE_SELF, &usage) != 0) return time;
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) * 1e-6;
  };
  const double tick = 1.0 / static_cast<double>(sysconf(_SC_CLK_TCK));
  time.known = true;
  for (const int64_t t : ticks) time.total += static_cast<double>(t) * tick;
  time.worked = static_cast<double>(ticks[0] + ticks[1] + ticks[2]) * tick;
  time.steal = static_cast<double>(ticks[7]) * tick;
  time.own = seconds(usage.ru_utime) + seconds(usage.ru_stime);
  return time;
}

}  // namespace stoker::bench
