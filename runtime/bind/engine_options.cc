#include "runtime/bind/engine_options.h"

#include <nanobind/stl/string.h>

#include <algorithm>
#include <iterator>
#include <span>
#include <string>

#include "runtime/base/errors.h"

namespace nb = nanobind;
using stoker::EngineOptions;
using stoker::Error;
using stoker::ErrorKind;

namespace {

// Returns the number of a name in the list of an enum.
int one_of(const char* option, std::span<const char* const> names, const std::string& found) {
  std::string expected;
  for (size_t i = 0; i < names.size(); ++i) {
    if (found == names[i]) return static_cast<int>(i);
    expected += (i == 0 ? "" : i + 1 == names.size() ? " or " : ", ") + std::string(names[i]);
  }
  throw Error(ErrorKind::kOption,
              std::string(option) + ": expected " + expected + ", found " + found);
}

struct Option {
  const char* name;
  void (*set)(EngineOptions& options, nb::handle value);
};

template <class T>
T as(nb::handle value) {
  return nb::cast<T>(value);
}

// Lists the engine's options (runtime/_core.pyi says what they are).
constexpr Option kOptions[] = {
    {"threads", [](EngineOptions& o, nb::handle v) { o.threads = as<int>(v); }},
    {"context", [](EngineOptions& o, nb::handle v) { o.context = as<int64_t>(v); }},
    {"kv_type",
     [](EngineOptions& o, nb::handle v) {
       o.kv_type =
           static_cast<stoker::KvType>(one_of("kv_type", stoker::kKvTypeNames, as<std::string>(v)));
     }},
    {"precision",
     [](EngineOptions& o, nb::handle v) {
       o.precision = static_cast<stoker::Precision>(
           one_of("precision", stoker::kPrecisionNames, as<std::string>(v)));
     }},
    {"memory", [](EngineOptions& o, nb::handle v) { o.offload.memory = as<int64_t>(v); }},
    {"process_bytes",
     [](EngineOptions& o, nb::handle v) { o.offload.process_bytes = as<int64_t>(v); }},
    {"policy", [](EngineOptions& o, nb::handle v) { o.offload.policy = as<std::string>(v); }},
    {"predictor", [](EngineOptions& o, nb::handle v) { o.offload.predictor = as<std::string>(v); }},
    {"predictor_state",
     [](EngineOptions& o, nb::handle v) {
       const auto state = as<nb::bytes>(v);
       o.offload.predictor_state.assign(state.c_str(), state.size());
     }},
    {"prefetch",
     [](EngineOptions& o, nb::handle v) {
       o.offload.prefetch = static_cast<stoker::PrefetchMode>(
           one_of("prefetch", stoker::kPrefetchModeNames, as<std::string>(v)));
     }},
    {"io", [](EngineOptions& o, nb::handle v) { o.offload.io.backend = as<std::string>(v); }},
    {"readers", [](EngineOptions& o, nb::handle v) { o.offload.io.readers = as<int>(v); }},
    {"direct", [](EngineOptions& o, nb::handle v) { o.offload.io.direct = as<bool>(v); }},
    {"cache", [](EngineOptions& o, nb::handle v) { o.offload.cache = as<bool>(v); }},
    {"overlap", [](EngineOptions& o, nb::handle v) { o.offload.overlap = as<bool>(v); }},
};

}  // namespace

EngineOptions engine_options(const nb::kwargs& given) {
  EngineOptions options;
  for (const auto [key, value] : given) {
    const auto name = nb::cast<std::string>(key);
    const auto* option = std::find_if(std::begin(kOptions), std::end(kOptions),
                                      [&](const Option& o) { return name == o.name; });
    if (option == std::end(kOptions)) {
      throw nb::type_error(("unexpected option " + name).c_str());
    }
    try {
      option->set(options, value);
    } catch (const std::bad_cast&) {
      throw nb::type_error(("option " + name + ": a value of another type").c_str());
    }
  }
  return options;
}
