// The program whose instructions mobile_bench/checks/instruction_counts.py counts: one matrix
// product, repeated, and nothing else. The difference between two repetition counts is the kernel's
// alone.
//
//   kernel_instructions FORMAT ISA ROWS COLS TOKENS REPETITIONS
//   kernel_instructions --isas       the instruction sets that execute here
//
// Prints the FNV-1a hash of the result's bits, which is the same on every instruction set.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>

#include "mobile_bench/native/kernel_speed.h"
#include "runtime/base/errors.h"

namespace {

using stoker::Error;
using stoker::ErrorKind;
using stoker::Isa;

Isa find_isa(const std::string& name) {
  for (int i = 0; i < stoker::kIsaCount; ++i) {
    if (name == stoker::isa_name(static_cast<Isa>(i))) return static_cast<Isa>(i);
  }
  throw Error(ErrorKind::kOption, "unknown instruction set " + name);
}

void list_isas() {
  for (int i = 0; i < stoker::kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (stoker::isa_usable(isa)) std::puts(stoker::isa_name(isa));
  }
}

void run(char** argv) {
  const stoker::Format* format = stoker::find_format(argv[1]);
  if (!format) throw Error(ErrorKind::kOption, std::string("unknown format ") + argv[1]);
  const int64_t rows = std::atoll(argv[3]), cols = std::atoll(argv[4]);
  const int64_t tokens = std::atoll(argv[5]), repetitions = std::atoll(argv[6]);
  stoker::KernelProduct product(*format, find_isa(argv[2]), rows, cols, tokens, 1);
  for (int64_t i = 0; i < repetitions; ++i) product.run();
  uint64_t hash = 0xcbf29ce484222325u;
  if (repetitions > 0) {
    for (int64_t i = 0; i < rows * tokens; ++i) {
      uint32_t bits;
      std::memcpy(&bits, product.y() + i, sizeof(bits));
      hash = (hash ^ bits) * 0x100000001b3u;
    }
  }
  std::printf("%016llx\n", static_cast<unsigned long long>(hash));
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc == 2 && std::strcmp(argv[1], "--isas") == 0) {
      list_isas();
    } else if (argc == 7) {
      run(argv);
    } else {
      std::fputs("usage: kernel_instructions FORMAT ISA ROWS COLS TOKENS REPETITIONS\n", stderr);
      return 2;
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kernel_instructions: %s\n", error.what());
    return 2;
  }
  return 0;
}
