// What one forward pass is about: the tokens of which sequences it evaluates, and why. Nothing in
// offload/ infers the one from the other.
#pragma once

#include <cstdint>
#include <span>

namespace stoker {

enum class Phase : uint8_t {
  kPrompt,  // tokens that are given; any number of a sequence
  kDecode,  // the last token of each of its sequences, just chosen
  kVerify,  // drafted tokens, which may be rejected: nothing is learnt from them
};
constexpr const char* kPhaseNames[] = {"prompt", "decode", "verify"};

struct StepRow {
  int64_t sequence = 0;  // a number that the tokens of one sequence have in common
  int32_t token = 0;
};

struct Step {
  Phase phase = Phase::kPrompt;
  // Those of one sequence are in the order of their positions, and follow those of its last step.
  std::span<const StepRow> rows;

  int64_t size() const { return static_cast<int64_t>(rows.size()); }
  bool is_prompt() const { return phase == Phase::kPrompt; }
  // One token of one sequence, which the tokens before it may foretell.
  bool is_single() const { return phase == Phase::kDecode && rows.size() == 1; }
};

}  // namespace stoker
