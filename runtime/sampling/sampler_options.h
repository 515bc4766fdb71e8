// The options of a sampler: numbers and token lists by name, which the stages read and check
// themselves.
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

  // Throws Error(kOption) where no stage has read an option: such an option belongs to none.
  void check_all_read() const;
  // Returns the number of this name, or `off`, the value that leaves its stage out.
  double number(std::string_view name, double off) const;
  // Does the same and checks that it is in [least, most]; `expected` says so in words.
  double number(std::string_view name, double off, double least, double most,
                const char* expected) const;
  // Returns the tokens of this name; none where there is no such option.
  std::vector<int32_t> list(std::string_view name) const;

 private:
  mutable std::set<std::string, std::less<>> read_;
};

}  // namespace stoker
