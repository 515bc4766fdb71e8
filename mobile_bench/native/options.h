// What `stoker-bench` is asked to do.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "runtime/core/engine.h"

namespace stoker::bench {

// How much of the device is measured for the profile line.
enum class ProfileKind {
  kFacts,  // nothing: only what the system tells
  kQuick,  // memory, arithmetic, storage, the model's own formats
  kFull,   // all formats, and longer
};

struct Options {
  std::string model;
  std::string command;                // as it was given, for the results
  std::vector<int32_t> ids;           // the prompt; empty: made up
  std::vector<int64_t> prompts;       // lengths, tokens
  int64_t decode_prompt = 64;         // most tokens before those that are decoded
  int64_t tokens = 128;               // to decode
  std::vector<int64_t> memory = {0};  // budgets, bytes; 0: everything in memory
  int repeats = 1;
  bool load_twice = false;
  ProfileKind profile = ProfileKind::kQuick;
  std::string out;       // results are appended to it; empty: stdout
  std::string device;    // a separate file for the profile; empty: none
  EngineOptions engine;  // offload.memory is set per run
  std::vector<std::pair<std::string, std::string>> changed;  // engine options that were named
};

// Throws Error(kOption) with one line. --help prints the help and exits.
Options parse_options(int argc, char** argv);

}  // namespace stoker::bench
