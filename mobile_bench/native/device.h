// The device that results belong to: the profile line of offload/plan/device_profile.py.
#pragma once

#include <string>

#include "mobile_bench/native/json.h"
#include "mobile_bench/native/options.h"
#include "runtime/gguf/gguf.h"

namespace stoker::bench {

// 12 hex digits that stay the same for a machine.
std::string device_id();

// The device profile: measures what options.profile asks for (storage on the model's own files)
// and describes the rest. Throws Error.
Json device_profile(const Options& options, const GgufFile& file);

// The model's facts for results: name, nbytes, architecture, type and sizes.
Json model_facts(const GgufFile& file);

}  // namespace stoker::bench
