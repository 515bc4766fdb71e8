// CPU identification and the choice of the instruction set: what STOKER_ISA may say, and that the
// SIGILL guard leaves the process as it found it.
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "kernels_cpu/isa/cpu.h"
#include "kernels_cpu/kernel.h"
#include "runtime/base/errors.h"

namespace {

int failures = 0;

void check(bool condition, const std::string& what) {
  if (condition) return;
  ++failures;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

// The error that active_isa() throws, or "" where it throws none.
std::string isa_error(const char* value) {
  setenv("STOKER_ISA", value, 1);
  try {
    stoker::active_isa();
  } catch (const stoker::Error& e) {
    check(e.kind() == stoker::ErrorKind::kOption, "STOKER_ISA raises an option error");
    return e.what();
  }
  return "";
}

void on_sigill(int) {}

}  // namespace

int main() {
  struct sigaction before = {}, after = {};
  before.sa_handler = on_sigill;
  sigaction(SIGILL, &before, nullptr);
  std::vector<std::thread> threads;  // the first call may come from several threads at once
  for (int i = 0; i < 4; ++i) threads.emplace_back([] { stoker::cpu(); });
  for (std::thread& t : threads) t.join();
  sigaction(SIGILL, nullptr, &after);
  check(after.sa_handler == on_sigill, "the SIGILL handler is the process's own again");

  const stoker::Cpu& cpu = stoker::cpu();
  check(cpu.executes[0], "scalar is always usable");
  check(1 <= cpu.performance && cpu.performance <= cpu.physical && cpu.physical <= cpu.logical,
        "1 <= performance <= physical <= logical cores");
  check(1 <= stoker::default_threads() && stoker::default_threads() <= cpu.performance,
        "1 <= default threads <= performance cores");

  // The order matters: the first value that is usable is kept for the life of the process.
  const std::string unknown = isa_error("avx1024");
  check(unknown.find("avx1024") != std::string::npos && unknown.find("scalar") != std::string::npos,
        "an unknown name is quoted and the usable ones are listed: " + unknown);
  check(unknown.find('\n') == std::string::npos, "one line");
  for (int i = 0; i < stoker::kIsaCount; ++i) {
    if (cpu.executes[i]) continue;
    const char* name = stoker::isa_name(static_cast<stoker::Isa>(i));
    check(isa_error(name).find("does not execute it") != std::string::npos,
          std::string("an ISA of another machine is refused: ") + name);
  }
  check(isa_error("scalar").empty(), "STOKER_ISA=scalar is accepted after errors");
  check(stoker::active_isa() == stoker::Isa::scalar, "STOKER_ISA=scalar is obeyed");
  check(isa_error("avx1024").empty(), "the choice, once made, stays");

  int count = 0;
  const stoker::Format* const* formats = stoker::all_formats(&count);
  for (int i = 0; i < count; ++i) {
    const stoker::Format& f = *formats[i];
    check(stoker::find_format(f.id) == &f && stoker::find_format(f.name) == &f,
          std::string("found by id and name: ") + f.name);
    for (int k = 0; k < stoker::kIsaCount; ++k) {
      const stoker::MatmulFn kernel = stoker::matmul_kernel(f, static_cast<stoker::Isa>(k));
      check(kernel != nullptr, std::string("every format has a kernel on every ISA: ") + f.name);
      if (cpu.executes[k] && f.matmul[k] != nullptr) {
        check(kernel == f.matmul[k], std::string("its own kernel where there is one: ") + f.name);
      }
    }
  }
  check(stoker::find_format("Q9_9") == nullptr, "an unknown name finds nothing");
  check(stoker::find_format(static_cast<stoker::FormatId>(77)) == nullptr,
        "an unknown id finds nothing");

  std::printf("%s: %d logical, %d physical, %d performance cores, quota %d; executes:",
              cpu.name.c_str(), cpu.logical, cpu.physical, cpu.performance, cpu.quota);
  for (int i = 0; i < stoker::kIsaCount; ++i) {
    if (cpu.executes[i]) std::printf(" %s", stoker::isa_name(static_cast<stoker::Isa>(i)));
  }
  std::printf("\ncpu_test: %d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
