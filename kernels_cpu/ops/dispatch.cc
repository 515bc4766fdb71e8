// The tables' lookups: formats by id and name, the instruction set in use, a format's kernel.
#include <cstdlib>
#include <cstring>
#include <string>

#include "kernels_cpu/isa/cpu.h"
#include "kernels_cpu/kernel.h"
#include "kernels_cpu/isa/tile_blocking.h"
#include "runtime/base/errors.h"

namespace stoker {

#define STOKER_FORMAT(name, id, block, bytes) extern const Format kFormat_##name;
#include "kernels_cpu/formats.inc"
#undef STOKER_FORMAT

namespace {

const Format* const kFormats[] = {
#define STOKER_FORMAT(name, id, block, bytes) &kFormat_##name,
#include "kernels_cpu/formats.inc"
#undef STOKER_FORMAT
};
constexpr int kFormatCount = static_cast<int>(sizeof(kFormats) / sizeof(kFormats[0]));

const char* const kIsaNames[] = {
#define STOKER_ISA_ROW(name) #name,
#include "kernels_cpu/isa.inc"
#undef STOKER_ISA_ROW
};
static_assert(sizeof(kIsaNames) / sizeof(kIsaNames[0]) == kIsaCount, "kIsaCount and isa.inc");

std::string usable_names() {
  std::string names;
  for (int i = 0; i < kIsaCount; ++i) {
    if (cpu().executes[i]) names += (names.empty() ? "" : ", ") + std::string(kIsaNames[i]);
  }
  return names;
}

Isa choose_isa() {
  const char* wanted = std::getenv("STOKER_ISA");
  int best = 0;
  for (int i = 0; i < kIsaCount; ++i) {
    if (cpu().executes[i]) best = i;
  }
  if (wanted == nullptr || *wanted == '\0') return static_cast<Isa>(best);
  for (int i = 0; i < kIsaCount; ++i) {
    if (std::strcmp(wanted, kIsaNames[i]) != 0) continue;
    if (cpu().executes[i]) return static_cast<Isa>(i);
    throw Error(ErrorKind::kOption,
                std::string("STOKER_ISA=") + wanted +
                    ": this machine does not execute it; usable here: " + usable_names());
  }
  throw Error(ErrorKind::kOption, std::string("STOKER_ISA=") + wanted +
                                      ": no such instruction set; usable here: " + usable_names());
}

}  // namespace

const Format* find_format(FormatId id) {
  for (const Format* format : kFormats) {
    if (format->id == id) return format;
  }
  return nullptr;
}

const Format* find_format(const char* name) {
  for (const Format* format : kFormats) {
    if (std::strcmp(format->name, name) == 0) return format;
  }
  return nullptr;
}

const Format* const* all_formats(int* count) {
  *count = kFormatCount;
  return kFormats;
}

const char* isa_name(Isa isa) { return kIsaNames[static_cast<int>(isa)]; }

bool isa_usable(Isa isa) { return cpu().executes[static_cast<int>(isa)]; }

Isa active_isa() {
  // A throw leaves `chosen` uninitialised, so that the next call reports the same error again.
  static const Isa chosen = choose_isa();
  return chosen;
}

MatmulFn matmul_kernel(const Format& f, Isa isa) {
  for (int i = static_cast<int>(isa); i > 0; --i) {
    if (f.matmul[i] != nullptr && cpu().executes[i]) return f.matmul[i];
  }
  return f.matmul[0];
}

size_t matmul_scratch_bytes(int64_t cols) {
  return static_cast<size_t>(packed_tokens_bytes(cols) + panel_bytes(cols) +
                             short_matrix_bytes(cols));
}

}  // namespace stoker
