// SIEVE (Zhang et al., NSDI 2024): a queue in order of insertion, one visited bit a unit, and a
// hand that moves from the oldest to the newest, clears the bits it passes and evicts the first
// unit whose bit is clear.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "offload/policy/policy.h"

namespace stoker {

namespace {

class Sieve : public Policy {
 public:
  explicit Sieve(const PolicyShape& shape)
      : node_(static_cast<size_t>(shape.n_layer * shape.n_expert)) {}

  void use(std::span<const UnitId> units, std::span<const float>) override {
    for (const UnitId unit : units) at(unit).visited = at(unit).resident;
  }

  void insert(UnitId unit) override {
    Node& node = at(unit);
    if (node.resident) return;
    node = Node{.newer = kNone, .older = newest_, .resident = true};
    (newest_ == kNone ? oldest_ : at(newest_).newer) = unit;
    newest_ = unit;
  }

  void erase(UnitId unit) override {
    Node& node = at(unit);
    if (!node.resident) return;
    if (hand_ == unit) hand_ = node.newer;
    (node.older == kNone ? oldest_ : at(node.older).newer) = node.newer;
    (node.newer == kNone ? newest_ : at(node.newer).older) = node.older;
    node.resident = false;
  }

  size_t victim(std::span<const UnitId> candidates) override {
    ++round_;
    for (size_t i = 0; i < candidates.size(); ++i) {
      at(candidates[i]).round = round_;
      at(candidates[i]).candidate = i;
    }
    // Two full turns are enough: the first may clear every candidate's bit. Units that are in use
    // now keep theirs.
    for (int turn = 0; turn < 3; ++turn) {
      for (; hand_ != kNone; hand_ = at(hand_).newer) {
        Node& node = at(hand_);
        if (node.round != round_) continue;
        if (!node.visited) return node.candidate;
        node.visited = false;
      }
      hand_ = oldest_;
    }
    return 0;  // reached only by candidates that were never inserted
  }

 private:
  static constexpr UnitId kNone = -1;
  struct Node {
    UnitId newer = kNone;
    UnitId older = kNone;
    bool resident = false;
    bool visited = false;
    uint64_t round = 0;    // of the victim() call in which it was a candidate
    size_t candidate = 0;  // its index in that call
  };

  Node& at(UnitId unit) { return node_[static_cast<size_t>(unit)]; }

  std::vector<Node> node_;  // [n_layer * n_expert]
  UnitId newest_ = kNone;
  UnitId oldest_ = kNone;
  UnitId hand_ = kNone;  // kNone: starts at the oldest
  uint64_t round_ = 0;
};

}  // namespace

std::unique_ptr<Policy> make_sieve_policy(const PolicyShape& shape) {
  return std::make_unique<Sieve>(shape);
}

}  // namespace stoker
