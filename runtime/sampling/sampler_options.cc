#include "runtime/sampling/sampler_options.h"

#include <cstdio>

#include "runtime/base/errors.h"

namespace stoker {

void check_option(bool good, std::string_view option, const char* expected, double found) {
  if (good) return;
  char text[32];
  std::snprintf(text, sizeof text, "%g", found);
  throw Error(ErrorKind::kOption,
              std::string(option) + ": expected " + expected + ", found " + text);
}

double SamplerOptions::number(std::string_view name, double off) const {
  read_.emplace(name);
  const auto it = numbers.find(name);
  return it == numbers.end() ? off : it->second;
}

double SamplerOptions::number(std::string_view name, double off, double least, double most,
                              const char* expected) const {
  const double value = number(name, off);
  check_option(value >= least && value <= most, name, expected, value);
  return value;
}

std::vector<int32_t> SamplerOptions::list(std::string_view name) const {
  read_.emplace(name);
  const auto it = tokens.find(name);
  return it == tokens.end() ? std::vector<int32_t>{} : it->second;
}

void SamplerOptions::check_all_read() const {
  const auto check = [&](const std::string& name) {
    if (!read_.count(name)) {
      throw Error(ErrorKind::kOption, name + ": expected an option of a sampling stage");
    }
  };
  for (const auto& [name, value] : numbers) check(name);
  for (const auto& [name, list] : tokens) check(name);
}

}  // namespace stoker
