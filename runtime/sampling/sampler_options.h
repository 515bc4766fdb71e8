// What a sampler is made with: numbers by name, which the stages read and check themselves.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace stoker {

// Throws Error(kOption) "<option>: expected <expected>, found <found>" unless `good`.
void check_option(bool good, std::string_view option, const char* expected, double found);

struct SamplerOptions {
  std::map<std::string, double, std::less<>> numbers;
  std::map<std::string, std::vector<int32_t>, std::less<>> tokens;  // lists of token ids
  std::vector<std::pair<int32_t, double>> logit_bias;               // token, added to its logit
  uint64_t seed = 0;
  int logprobs = 0;

  // Throws Error(kOption) where there is an option that nobody has read: it is of no stage.
  void check_all_read() const;
  // The number of this name, or the value that leaves its stage out.
  double number(std::string_view name, double off) const;
  // The same, checked to be in [least, most]; `expected` says so in words.
  double number(std::string_view name, double off, double least, double most,
                const char* expected) const;
  // The tokens of this name; none where there is no such option.
  std::vector<int32_t> list(std::string_view name) const;

 private:
  mutable std::set<std::string, std::less<>> read_;
};

}  // namespace stoker
