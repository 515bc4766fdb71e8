// Evicts the least recently used unit: the one whose last use lies furthest back in the forward
// pass.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "offload/policy/policy.h"

namespace stoker {

namespace {

class Lru : public Policy {
 public:
  explicit Lru(const PolicyShape& shape)
      : last_(static_cast<size_t>(shape.n_layer * shape.n_expert), 0) {}

  void use(std::span<const UnitId> units, std::span<const float>) override {
    for (const UnitId unit : units) last_[static_cast<size_t>(unit)] = ++now_;
  }

  size_t victim(std::span<const UnitId> candidates) override {
    size_t oldest = 0;
    int64_t oldest_use = last_[static_cast<size_t>(candidates[0])];
    for (size_t i = 1; i < candidates.size(); ++i) {
      const int64_t use = last_[static_cast<size_t>(candidates[i])];
      if (use < oldest_use) {
        oldest = i;
        oldest_use = use;
      }
    }
    return oldest;
  }

 private:
  int64_t now_ = 0;
  std::vector<int64_t> last_;  // [n_layer * n_expert]: number of the last use, 0 before any
};

}  // namespace

std::unique_ptr<Policy> make_lru_policy(const PolicyShape& shape) {
  return std::make_unique<Lru>(shape);
}

}  // namespace stoker
