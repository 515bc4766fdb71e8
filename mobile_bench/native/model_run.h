// One repeat of one configuration: the run line of mobile_bench/run/records.py.
#pragma once

#include <memory>
#include <string>

#include "mobile_bench/native/json.h"
#include "mobile_bench/native/options.h"
#include "runtime/gguf/gguf.h"

namespace stoker::bench {

// The facts that all runs of a command share, and which run this is.
struct RunPlace {
  std::string run;     // the command's id
  std::string device;  // the device's id
  int64_t memory = 0;  // the budget; 0: everything in memory
  int repeat = 0;
};

// Loads, evaluates the prompts, decodes; reports progress on stderr. If the engine refuses, the
// line has an `error`.
Json measure_run(const Options& options, const std::shared_ptr<const GgufFile>& file,
                 const RunPlace& place);

// The line of a run whose process ended before it could write one.
Json failed_run(const Options& options, const GgufFile& file, const RunPlace& place,
                const std::string& error);

}  // namespace stoker::bench
