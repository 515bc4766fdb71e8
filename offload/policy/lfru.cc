// Frequency over recency: evicts the unit with the fewest uses of the whole past per token since
// its last use; among equals the least recently used. It lies between LRU and LFU: a popular unit
// survives a pause that grows with its count.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "offload/policy/policy.h"
#include "offload/policy/token_clock.h"

namespace stoker {

namespace {

class Lfru : public Policy {
 public:
  explicit Lfru(const PolicyShape& shape)
      : unit_(static_cast<size_t>(shape.n_layer * shape.n_expert)) {}

  void begin_layer(int64_t layer, int64_t tokens, bool) override {
    clock_.begin_layer(layer, tokens);
  }

  void use(std::span<const UnitId> units, std::span<const float>) override {
    const int64_t token = clock_.next_use();
    for (const UnitId id : units) {
      Unit& unit = unit_[static_cast<size_t>(id)];
      ++unit.uses;
      unit.token = token;
      unit.order = ++order_;
    }
  }

  size_t victim(std::span<const UnitId> candidates) override {
    const int64_t now = clock_.now();
    size_t least = 0;
    Unit worst = unit_[static_cast<size_t>(candidates[0])];
    for (size_t i = 1; i < candidates.size(); ++i) {
      const Unit& unit = unit_[static_cast<size_t>(candidates[i])];
      // Compares uses / (tokens since + 1) exactly: both sides are multiplied by the denominators.
      const int64_t mine = unit.uses * (now - worst.token + 1);
      const int64_t other = worst.uses * (now - unit.token + 1);
      if (mine < other || (mine == other && unit.order < worst.order)) {
        least = i;
        worst = unit;
      }
    }
    return least;
  }

 private:
  struct Unit {
    int64_t uses = 0;
    int64_t token = 0;  // token of the last use
    int64_t order = 0;  // number of the last use among all uses
  };
  TokenClock clock_;
  int64_t order_ = 0;
  std::vector<Unit> unit_;  // [n_layer * n_expert]
};

}  // namespace

std::unique_ptr<Policy> make_lfru_policy(const PolicyShape& shape) {
  return std::make_unique<Lfru>(shape);
}

}  // namespace stoker
