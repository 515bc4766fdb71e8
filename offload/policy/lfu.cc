// Evicts the least frequently used unit, with all counts halved every 16 tokens; among equals the
// least recently used.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "offload/policy/policy.h"
#include "offload/policy/token_clock.h"

namespace stoker {

namespace {

constexpr int64_t kTokensAHalving = 16;  // between 8 and 32, where recorded traces do best
constexpr int64_t kHalvingsARescale = 512;

class Lfu : public Policy {
 public:
  explicit Lfu(const PolicyShape& shape)
      : count_(static_cast<size_t>(shape.n_layer * shape.n_expert), 0.0), last_(count_.size(), 0) {}

  void begin_layer(int64_t layer, int64_t tokens, bool) override {
    clock_.begin_layer(layer, tokens);
  }

  // Instead of halving every count, a use counts twice as much after each halving: the order is the
  // same and only the used units are touched.
  void use(std::span<const UnitId> units, std::span<const float>) override {
    const int64_t halvings = clock_.next_use() / kTokensAHalving;
    while (halvings - rescaled_ > kHalvingsARescale) {
      for (double& count : count_) count = std::ldexp(count, -static_cast<int>(kHalvingsARescale));
      rescaled_ += kHalvingsARescale;
    }
    const double one = std::ldexp(1.0, static_cast<int>(halvings - rescaled_));
    for (const UnitId unit : units) {
      count_[static_cast<size_t>(unit)] += one;
      last_[static_cast<size_t>(unit)] = ++uses_;
    }
  }

  size_t victim(std::span<const UnitId> candidates) override {
    size_t least = 0;
    for (size_t i = 1; i < candidates.size(); ++i) {
      const auto unit = static_cast<size_t>(candidates[i]);
      const auto other = static_cast<size_t>(candidates[least]);
      if (count_[unit] < count_[other] ||
          (count_[unit] == count_[other] && last_[unit] < last_[other])) {
        least = i;
      }
    }
    return least;
  }

 private:
  TokenClock clock_;
  int64_t rescaled_ = 0;  // halvings already divided out of every count
  int64_t uses_ = 0;
  std::vector<double> count_;  // [n_layer * n_expert]: decayed uses, times 2^(halvings - rescaled_)
  std::vector<int64_t> last_;  // [n_layer * n_expert]: number of the last use
};

}  // namespace

std::unique_ptr<Policy> make_lfu_policy(const PolicyShape& shape) {
  return std::make_unique<Lfu>(shape);
}

}  // namespace stoker
