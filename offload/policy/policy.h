// Who leaves the cache. A policy sees every use of a unit in the order of the forward pass and
// answers one question: which of these resident units is worth least.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "offload/units/unit.h"

namespace stoker {

// What a policy may know of the model.
struct PolicyShape {
  int64_t n_layer = 0;
  int64_t n_expert = 0;       // of a layer
  int64_t n_expert_used = 0;  // by a token
};

class TokenHistory;

class Policy {
 public:
  virtual ~Policy() = default;
  // Called once, before all else, where tokens are known.
  virtual void follow(const TokenHistory* history) { (void)history; }
  // The history knows of the tokens of a new evaluation.
  virtual void foresee() {}
  // Layer `layer` of an evaluation of `tokens` tokens begins; layer 0 begins a new evaluation.
  // follows: it is one token that follows the one of the evaluation before.
  virtual void begin_layer(int64_t layer, int64_t tokens, bool follows) {
    (void)layer, (void)tokens, (void)follows;
  }
  // A token of this layer chose `units`, with the weights the router gave them (same length). A
  // prompt's chunk calls this once for each token. Called before victims for them are asked for,
  // whether or not they are resident.
  virtual void use(std::span<const UnitId> units, std::span<const float> weights) = 0;
  virtual void insert(UnitId unit) { (void)unit; }  // became resident (or is on its way)
  virtual void erase(UnitId unit) { (void)unit; }   // left, by victim() or a failed read
  // The index into `candidates` (resident, not pinned; not empty) of the one to evict.
  virtual size_t victim(std::span<const UnitId> candidates) = 0;
};

// Throws Error(kOption) for a name that policies.inc lacks.
std::unique_ptr<Policy> make_policy(std::string_view name, const PolicyShape& shape);
std::vector<std::string_view> policy_names();
inline constexpr std::string_view kDefaultPolicy = "reuse";

}  // namespace stoker
