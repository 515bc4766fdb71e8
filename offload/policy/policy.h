// A policy decides which unit leaves the cache. It sees every use of a unit in the order of the
// forward pass and answers one question: which of these resident units is worth least.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "offload/units/unit.h"

namespace stoker {

// The facts about the model that a policy may use.
struct PolicyShape {
  int64_t n_layer = 0;
  int64_t n_expert = 0;       // experts of a layer
  int64_t n_expert_used = 0;  // experts that a token uses
};

class TokenHistory;

class Policy {
 public:
  virtual ~Policy() = default;
  // Called once, before all other methods, where tokens are known.
  virtual void follow(const TokenHistory* history) { (void)history; }
  // Called when the history has received the tokens of a new evaluation.
  virtual void foresee() {}
  // Layer `layer` of an evaluation of `tokens` tokens begins; layer 0 begins a new evaluation.
  // follows: the layer computes one token, which follows the token of the previous evaluation.
  virtual void begin_layer(int64_t layer, int64_t tokens, bool follows) {
    (void)layer, (void)tokens, (void)follows;
  }
  // Records that a token of this layer chose `units`, with the weights that the router gave them
  // (same length). A chunk of several rows calls this once for each row. It is called before
  // victims for these units are asked for, whether or not they are resident.
  virtual void use(std::span<const UnitId> units, std::span<const float> weights) = 0;
  virtual void insert(UnitId unit) { (void)unit; }  // it became resident (or is being read)
  virtual void erase(UnitId unit) { (void)unit; }   // it left, by victim() or after a failed read
  // Returns the index into `candidates` (resident, not pinned; not empty) of the one to evict.
  virtual size_t victim(std::span<const UnitId> candidates) = 0;
};

// Throws Error(kOption) for a name that policies.inc lacks.
std::unique_ptr<Policy> make_policy(std::string_view name, const PolicyShape& shape);
std::vector<std::string_view> policy_names();
inline constexpr std::string_view kDefaultPolicy = "reuse";

}  // namespace stoker
