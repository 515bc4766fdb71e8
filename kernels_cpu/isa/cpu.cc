#include "kernels_cpu/isa/cpu.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <set>
#include <string>
#include <vector>

#include "kernels_cpu/target.h"
#include "runtime/base/control_groups.h"
#include "runtime/base/system_file.h"

#if defined(__linux__)
#include <sched.h>
#include <sys/auxv.h>
#endif
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#define STOKER_POSIX 1
#include <csetjmp>
#include <csignal>
#include <pthread.h>
#else
#include <thread>
#endif
#if defined(STOKER_X86)
#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns inside its own AVX-512 headers.
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace stoker {
namespace {

// ---- probes: a few instructions of each kind; the result depends on the input, so that the
// compiler can neither fold nor drop them. ----

using Probe = int (*)(const int8_t* bytes);  // bytes: [64]

#if defined(STOKER_X86)
STOKER_BEGIN_AVX2
int probe_avx2(const int8_t* bytes) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
  const __m256i s = _mm256_madd_epi16(_mm256_maddubs_epi16(v, v), _mm256_set1_epi16(1));
  const __m256 h = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  const __m256 f = _mm256_fmadd_ps(_mm256_cvtepi32_ps(s), h, h);
  return _mm256_movemask_ps(f);
}
STOKER_END_TARGET

STOKER_BEGIN_AVXVNNI
int probe_avxvnni(const int8_t* bytes) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
  return _mm256_movemask_epi8(_mm256_dpbusd_avx_epi32(v, v, v));
}
STOKER_END_TARGET

STOKER_BEGIN_AVX512
int probe_avx512(const int8_t* bytes) {
  const __m512i v = _mm512_loadu_si512(bytes);
  const __m512i p = _mm512_permutexvar_epi8(v, v);     // VBMI
  const __m512i d = _mm512_dpbusd_epi32(v, p, v);      // VNNI
  const __mmask64 m = _mm512_cmpgt_epi8_mask(d, v);    // BW
  const __m512i x = _mm512_mask_add_epi8(v, m, d, p);  // BW
  const __m256i half =
      _mm256_mask_add_epi32(_mm512_castsi512_si256(x), 0x5a, _mm512_castsi512_si256(p),
                            _mm512_extracti32x8_epi32(d, 1));  // VL, DQ
  const __m512 f =
      _mm512_fmadd_ps(_mm512_cvtph_ps(half), _mm512_cvtepi32_ps(x), _mm512_cvtepi32_ps(d));
  return static_cast<int>(_mm512_movepi32_mask(_mm512_castps_si512(f)));
}
STOKER_END_TARGET

void cpuid(unsigned leaf, unsigned sub, unsigned r[4]) {
#if defined(_MSC_VER) && !defined(__clang__)
  int v[4];
  __cpuidex(v, static_cast<int>(leaf), static_cast<int>(sub));
  for (int i = 0; i < 4; ++i) r[i] = static_cast<unsigned>(v[i]);
#else
  __cpuid_count(leaf, sub, r[0], r[1], r[2], r[3]);
#endif
}

uint64_t enabled_state() {  // XCR0: the register state that the operating system saves
#if defined(_MSC_VER) && !defined(__clang__)
  return _xgetbv(0);
#else
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (static_cast<uint64_t>(hi) << 32) | lo;
#endif
}

void announced(bool* isa) {
  unsigned r[4];
  cpuid(0, 0, r);
  const unsigned leaves = r[0];
  cpuid(1, 0, r);
  const unsigned ecx1 = r[2];
  const auto bit = [](unsigned word, int i) { return ((word >> i) & 1) != 0; };
  if (leaves < 7 || !bit(ecx1, 27)) return;  // no OSXSAVE: no wide registers
  const uint64_t state = enabled_state();
  if ((state & 0x6) != 0x6) return;
  cpuid(7, 0, r);
  const unsigned subleaves = r[0], ebx7 = r[1], ecx7 = r[2];
  const bool avx2 = bit(ecx1, 28) && bit(ecx1, 12) && bit(ecx1, 29) && bit(ebx7, 5);
  isa[static_cast<int>(Isa::avx2)] = avx2;
  if (avx2 && subleaves >= 1) {
    unsigned s[4];
    cpuid(7, 1, s);
    isa[static_cast<int>(Isa::avxvnni)] = bit(s[0], 4);
  }
  isa[static_cast<int>(Isa::avx512)] = avx2 && (state & 0xe6) == 0xe6 && bit(ebx7, 16) &&
                                       bit(ebx7, 17) && bit(ebx7, 30) && bit(ebx7, 31) &&
                                       bit(ecx7, 1) && bit(ecx7, 11);
}

constexpr Probe kProbes[kIsaCount] = {nullptr,      probe_avx2, probe_avxvnni,
                                      probe_avx512, nullptr,    nullptr};

std::string processor_name() {
  unsigned r[4];
  cpuid(0x80000000u, 0, r);
  if (r[0] < 0x80000004u) return "x86-64";
  char text[49] = {};
  for (unsigned i = 0; i < 3; ++i) {
    cpuid(0x80000002u + i, 0, r);
    std::memcpy(text + 16 * i, r, 16);
  }
  std::string name(text);
  name.erase(0, std::min(name.find_first_not_of(' '), name.size()));
  name.erase(name.find_last_not_of(' ') + 1);
  return name;
}

#elif defined(STOKER_ARM64)
STOKER_BEGIN_NEON
int probe_neon(const int8_t* bytes) {
  const int8x16_t v = vld1q_s8(bytes);
  return vaddvq_s32(vdotq_s32(vdupq_n_s32(0), v, v));
}
STOKER_END_TARGET

STOKER_BEGIN_I8MM
int probe_i8mm(const int8_t* bytes) {
  const int8x16_t v = vld1q_s8(bytes);
  return vaddvq_s32(vmmlaq_s32(vdupq_n_s32(0), v, v));
}
STOKER_END_TARGET

#if defined(__APPLE__)
bool has(const char* name) {
  int value = 0;
  size_t size = sizeof(value);
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
#endif

void announced(bool* isa) {
#if defined(__APPLE__)
  isa[static_cast<int>(Isa::neon)] = has("hw.optional.arm.FEAT_DotProd");
  isa[static_cast<int>(Isa::i8mm)] = has("hw.optional.arm.FEAT_I8MM");
#elif defined(__linux__)
  constexpr unsigned long kDotProd = 1ul << 20;  // HWCAP_ASIMDDP
  constexpr unsigned long kI8mm = 1ul << 13;     // HWCAP2_I8MM
  isa[static_cast<int>(Isa::neon)] = (getauxval(AT_HWCAP) & kDotProd) != 0;
  isa[static_cast<int>(Isa::i8mm)] =
      (getauxval(AT_HWCAP) & kDotProd) != 0 && (getauxval(AT_HWCAP2) & kI8mm) != 0;
#else
  (void)isa;
#endif
}

constexpr Probe kProbes[kIsaCount] = {nullptr, nullptr, nullptr, nullptr, probe_neon, probe_i8mm};
std::string processor_name() { return "aarch64"; }
#else
void announced(bool*) {}
constexpr Probe kProbes[kIsaCount] = {};
std::string processor_name() { return "unknown processor"; }
#endif

// ---- running a probe under a SIGILL guard ----

#if defined(STOKER_POSIX)
sigjmp_buf probe_return;
std::atomic<bool> probing{false};
pthread_t probing_thread;
struct sigaction previous_action;

void on_illegal_instruction(int signal_number) {
  if (probing.load() && pthread_equal(pthread_self(), probing_thread)) {
    siglongjmp(probe_return, 1);
  }
  // No probe caused this signal: the previous action is restored, and the instruction runs again
  // and meets it.
  sigaction(signal_number, &previous_action, nullptr);
}

bool survives(Probe probe) {
  int8_t bytes[64];
  for (int i = 0; i < 64; ++i) bytes[i] = static_cast<int8_t>(i);
  struct sigaction action = {};
  action.sa_handler = on_illegal_instruction;
  sigemptyset(&action.sa_mask);
  probing_thread = pthread_self();
  if (sigaction(SIGILL, &action, &previous_action) != 0) return false;
  volatile bool ran = false;
  if (sigsetjmp(probe_return, 1) == 0) {
    probing.store(true);
    volatile int result = probe(bytes);
    (void)result;
    ran = true;
  }
  probing.store(false);
  sigaction(SIGILL, &previous_action, nullptr);
  return ran;
}
#else
bool survives(Probe probe) {
  int8_t bytes[64] = {1};
  volatile int result = probe(bytes);
  (void)result;
  return true;
}
#endif

// ---- counting cores ----

#if defined(__linux__)
// Parses a list of CPUs: "0-3,8" gives {0, 1, 2, 3, 8}.
std::set<int> cpu_list(const std::string& text) {
  std::set<int> cpus;
  const char* p = text.c_str();
  while (*p >= '0' && *p <= '9') {
    char* end = nullptr;
    const long first = std::strtol(p, &end, 10);
    long last = first;
    if (*end == '-') last = std::strtol(end + 1, &end, 10);
    for (long i = first; i <= last && i - first < 65536; ++i) cpus.insert(static_cast<int>(i));
    p = *end == ',' ? end + 1 : end;
  }
  return cpus;
}

std::vector<int> allowed_cpus() {
  std::vector<int> cpus;
  for (int bits = 1024; bits <= (1 << 18); bits *= 4) {  // the kernel refuses too small a mask
    std::vector<unsigned long> mask(static_cast<size_t>(bits) / (8 * sizeof(unsigned long)));
    if (sched_getaffinity(0, mask.size() * sizeof(mask[0]),
                          reinterpret_cast<cpu_set_t*>(mask.data())) != 0) {
      continue;
    }
    const int width = static_cast<int>(8 * sizeof(unsigned long));
    for (int i = 0; i < bits; ++i) {
      if ((mask[static_cast<size_t>(i / width)] >> (i % width)) & 1) cpus.push_back(i);
    }
    break;
  }
  if (cpus.empty()) cpus.push_back(0);
  return cpus;
}

void count_cores(Cpu* out) {
  const std::vector<int> cpus = allowed_cpus();
  const std::string root = "/sys/devices/system/cpu/cpu";
  const std::set<int> intel_performance = cpu_list(first_line("/sys/devices/cpu_core/cpus"));
  std::set<std::string> cores;
  std::vector<std::pair<std::string, int64_t>> speed;  // one entry a CPU: its core, its capacity
  int64_t fastest = 0;
  bool by_capacity = false;
  for (const int i : cpus) {
    const std::string dir = root + std::to_string(i);
    std::string core = first_line(dir + "/topology/thread_siblings_list");
    if (core.empty()) core = std::to_string(i);
    cores.insert(core);
    int64_t value = first_number(dir + "/cpu_capacity");
    if (value > 0) {
      by_capacity = true;
    } else if (!intel_performance.empty()) {
      value = intel_performance.count(i) != 0 ? 1000 : 1;
    } else {
      value = first_number(dir + "/cpufreq/cpuinfo_max_freq");
    }
    speed.emplace_back(core, value);
    fastest = std::max(fastest, value);
  }
  // Cores of one class differ by some percent in peak clock; a small core has a capacity below
  // half of a big one's, or two thirds of its clock.
  const double share = by_capacity ? 0.6 : 0.75;
  std::set<std::string> performance;
  for (const auto& [core, value] : speed) {
    if (value <= 0 || static_cast<double>(value) >= share * static_cast<double>(fastest)) {
      performance.insert(core);
    }
  }
  out->logical = static_cast<int>(cpus.size());
  out->physical = static_cast<int>(cores.size());
  out->performance = std::max(1, static_cast<int>(performance.size()));
  out->quota = cpu_quota();
#if defined(STOKER_ARM64)
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.rfind("Hardware", 0) == 0 || line.rfind("model name", 0) == 0) {
      const size_t colon = line.find(": ");
      if (colon != std::string::npos) out->name = line.substr(colon + 2);
    }
  }
#endif
}
#elif defined(__APPLE__)
int sysctl_int(const char* name, int otherwise) {
  int value = 0;
  size_t size = sizeof(value);
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value > 0 ? value : otherwise;
}

void count_cores(Cpu* out) {
  out->logical = sysctl_int("hw.logicalcpu", 1);
  out->physical = sysctl_int("hw.physicalcpu", out->logical);
  out->performance = sysctl_int("hw.perflevel0.physicalcpu", out->physical);
  char text[128] = {};
  size_t size = sizeof(text) - 1;
  if (sysctlbyname("machdep.cpu.brand_string", text, &size, nullptr, 0) == 0) out->name = text;
}
#else
void count_cores(Cpu* out) {
  out->logical = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  out->physical = out->logical;
  out->performance = out->logical;
}
#endif

Cpu identify() {
  Cpu found;
  found.name = processor_name();
  bool says[kIsaCount] = {};
  announced(says);
  for (int i = 0; i < kIsaCount; ++i) {
    found.executes[i] = kProbes[i] != nullptr && says[i] && survives(kProbes[i]);
  }
  found.executes[static_cast<int>(Isa::scalar)] = true;
  count_cores(&found);
  return found;
}

}  // namespace

const Cpu& cpu() {
  static const Cpu found = identify();
  return found;
}

int default_threads() {
  const Cpu& c = cpu();
  return c.quota > 0 ? std::min(c.quota, c.performance) : c.performance;
}

}  // namespace stoker
