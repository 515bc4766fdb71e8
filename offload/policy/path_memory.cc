#include "offload/policy/path_memory.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace stoker {

namespace {

// These were chosen by replaying three recorded traces (tests/offload/test_simulate.py). A
// sharpness of 14 or 20 loses a fifth to a third of what the memory gains there.
constexpr float kSharpness = 8.0f;    // weight exp(sharpness * share of experts in common)
constexpr float kCarry = 0.63f;       // share of a token's weight that passes to its successor
constexpr float kNegligible = 0.02f;  // share of the largest weight below which none counts

}  // namespace

PathMemory::PathMemory(const PolicyShape& shape)
    : n_layer_(shape.n_layer),
      n_expert_(shape.n_expert),
      width_(std::clamp<int64_t>(shape.n_expert_used, 1, shape.n_expert)),
      path_(static_cast<size_t>(kTokens * n_layer_ * width_), -1),
      taken_(static_cast<size_t>(n_layer_ * n_expert_), Tokens{}),
      common_(static_cast<size_t>(n_layer_ * kTokens), 0),
      compared_(static_cast<size_t>(n_layer_), 0),
      sum_{} {
  weighed_.reserve(kTokens);
  likeness_.resize(static_cast<size_t>(n_layer_ * width_) + 1);
  for (size_t less = 0; less < likeness_.size(); ++less) {
    const float share = static_cast<float>(less) / static_cast<float>(n_layer_ * width_);
    likeness_[less] = std::exp(-kSharpness * share);
  }
}

std::span<int32_t> PathMemory::path(size_t slot, int64_t layer) {
  const size_t at = (slot * static_cast<size_t>(n_layer_) + static_cast<size_t>(layer)) *
                    static_cast<size_t>(width_);
  return {path_.data() + at, static_cast<size_t>(width_)};
}

std::span<const int32_t> PathMemory::path(size_t slot, int64_t layer) const {
  return const_cast<PathMemory*>(this)->path(slot, layer);
}

void PathMemory::begin(bool one_token) {
  ++evaluations_;
  if (one_token) {
    std::rotate(sum_.begin(), sum_.end() - 1, sum_.end());
  } else {
    sum_.fill(0);
    std::fill(common_.begin(), common_.end(), uint16_t{0});
  }
}

void PathMemory::take(int64_t token, int64_t layer, std::span<const int32_t> experts) {
  const size_t at = slot(token);
  const uint64_t bit = uint64_t{1} << (at % 64);
  Tokens* taken = taken_.data() + layer * n_expert_;
  const std::span<int32_t> mine = path(at, layer);
  for (int32_t& expert : mine) {
    if (expert >= 0) taken[expert][at / 64] &= ~bit;
    expert = -1;
  }
  const size_t count = std::min(experts.size(), mine.size());
  for (size_t i = 0; i < count; ++i) {
    mine[i] = experts[i];
    taken[experts[i]][at / 64] |= bit;
  }
  newest_ = std::max(newest_, token);
}

void PathMemory::compare(int64_t token, int64_t layer) {
  std::array<uint16_t, kTokens> now{};
  for (const int32_t expert : path(slot(token), layer)) {
    if (expert < 0) break;
    const Tokens& taken = taken_[static_cast<size_t>(layer * n_expert_ + expert)];
    for (size_t word = 0; word < taken.size(); ++word) {
      for (uint64_t bits = taken[word]; bits != 0; bits &= bits - 1) {
        ++now[word * 64 + static_cast<size_t>(std::countr_zero(bits))];
      }
    }
  }
  uint16_t* before = common_.data() + layer * kTokens;
  const auto shift = static_cast<size_t>(evaluations_ - compared_[static_cast<size_t>(layer)]);
  for (size_t s = 0; s < kTokens; ++s) {
    sum_[s] += now[s] - before[(s + kTokens - shift % kTokens) % kTokens];
  }
  std::copy(now.begin(), now.end(), before);
  compared_[static_cast<size_t>(layer)] = evaluations_;
}

void PathMemory::weigh(int64_t token) {
  weighed_.clear();
  const int64_t oldest = std::max<int64_t>(0, newest_ - kTokens + 1);
  if (token <= oldest) return;
  int32_t most = 0;
  for (int64_t t = oldest; t < token; ++t) most = std::max(most, sum_[slot(t)]);
  float carried = 0, total = 0, largest = 0;
  for (int64_t t = oldest; t < token; ++t) {
    const auto less = static_cast<size_t>(most - sum_[slot(t)]);
    carried = carried * kCarry + (less < likeness_.size() ? likeness_[less] : 0.0f);
    largest = std::max(largest, carried);
    weighed_.push_back({slot(t), slot(t + 1), carried});
  }
  std::erase_if(weighed_, [&](const Weighed& w) { return w.weight < kNegligible * largest; });
  for (const Weighed& w : weighed_) total += w.weight;
  for (Weighed& w : weighed_) w.weight /= total;
}

void PathMemory::foretell(int64_t layer, bool ahead, std::span<float> share) const {
  std::fill(share.begin(), share.end(), 0.0f);
  for (const Weighed& w : weighed_) {
    for (const int32_t expert : path(ahead ? w.token : w.successor, layer)) {
      if (expert < 0) break;
      share[static_cast<size_t>(expert)] += w.weight;
    }
  }
}

}  // namespace stoker
