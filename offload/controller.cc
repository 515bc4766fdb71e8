#include "offload/controller.h"

#include <algorithm>
#include <cstdio>
#include <numeric>

namespace stoker {

namespace {

// Weight of one more outcome in a decayed mean.
constexpr float kOutcome = 1.0f / 64;
// What a predictor's first choice is worth before anything is known; later ranks less.
constexpr float kPrior = 0.7f;
// A trial compares this many tokens without prefetch with as many just before.
constexpr int64_t kTrial = 12;
// The cache fills first; then trials, ever rarer while their outcome stays the same.
constexpr int64_t kFirstTrial = 48;
constexpr int64_t kMaxBackoff = 16;
// The side in use is kept unless the other one is faster by this share.
constexpr double kGain = 0.01;

}  // namespace

Controller::Controller(const PredictorShape& shape, PrefetchMode mode)
    : shape_(shape), mode_(mode), active_(mode != PrefetchMode::kOff) {
  width_ = std::min({shape.n_expert, shape.n_expert_used + (shape.n_expert_used + 1) / 2, kMaxRank});
  for (int64_t d = 0; d < kMaxDistance; ++d) {
    for (int64_t r = 0; r < kMaxRank; ++r) {
      const float fall = static_cast<float>(r) / static_cast<float>(2 * shape.n_expert_used + 1);
      came_true_[static_cast<size_t>(d)][static_cast<size_t>(r)] =
          std::max(0.1f, kPrior - 0.05f * static_cast<float>(d) - fall);
    }
  }
  pending_.resize(static_cast<size_t>(shape.n_layer));
  phase_left_ = kFirstTrial;
}

double Controller::precision(int64_t ahead, int64_t rank) const {
  return came_true_[static_cast<size_t>(std::clamp<int64_t>(ahead - 1, 0, kMaxDistance - 1))]
                   [static_cast<size_t>(std::clamp<int64_t>(rank, 0, kMaxRank - 1))];
}

void Controller::begin(int64_t tokens, double now_s, double busy_s) {
  tokens_ = tokens;
  began_s_ = now_s;
  busy_s_ = busy_s;
  for (auto& layer : pending_) {
    for (Pending& p : layer) p.made_at = -1;
  }
}

void Controller::end(double now_s, double busy_s) {
  const double seconds = now_s - began_s_;
  if (tokens_ == 1 && seconds > 0) weigh(seconds, std::min(1.0, (busy_s - busy_s_) / seconds));
}

void Controller::weigh(double token_s, double busy_share) {
  // A read that turns out useless is paid in full where the disk never rests, and costs next to
  // nothing where it is idle.
  const float wanted = static_cast<float>(0.25 + 0.5 * busy_share);
  threshold_ += (wanted - threshold_) / 16;
  if (mode_ != PrefetchMode::kAuto) return;
  times_.push_back(token_s);
  if (--phase_left_ > 0) return;
  // The last tokens of the phase: its first ones still feel the phase before.
  const size_t n = std::min(times_.size(), static_cast<size_t>(kTrial - kTrial / 4));
  const double mean =
      std::accumulate(times_.end() - static_cast<int64_t>(n), times_.end(), 0.0) /
      static_cast<double>(n);
  times_.clear();
  double& side = active_ ? with_s_ : without_s_;
  const double other = active_ ? without_s_ : with_s_;
  side = side == 0 ? mean : (side + mean) / 2;
  if (!trial_) {
    trial_ = true;
    active_ = !active_;
    phase_left_ = kTrial;
    return;
  }
  trial_ = false;
  if (side < (1 - kGain) * other) {
    backoff_ = 1;  // the other side is faster: stay there
  } else {
    active_ = !active_;
    backoff_ = std::min(2 * backoff_, kMaxBackoff);
  }
  phase_left_ = backoff_ * 4 * kTrial;
}

void Controller::guessed(int64_t layer, const Guess& guess, std::vector<float>* probability) {
  const int64_t ahead = guess.layer - layer;
  probability->resize(guess.experts.size());
  for (size_t r = 0; r < guess.experts.size(); ++r) {
    (*probability)[r] = static_cast<float>(precision(ahead, static_cast<int64_t>(r)));
  }
  if (ahead < 1 || ahead > kMaxDistance || tokens_ != 1) return;
  Pending& p = pending_[static_cast<size_t>(guess.layer)][static_cast<size_t>(ahead - 1)];
  p.made_at = layer;
  p.experts.assign(guess.experts.begin(), guess.experts.end());
}

void Controller::judge(int64_t layer, std::span<const int32_t> experts) {
  auto& guesses = pending_[static_cast<size_t>(layer)];
  for (size_t d = 0; d < guesses.size(); ++d) {
    Pending& p = guesses[d];
    if (p.made_at < 0) continue;
    p.made_at = -1;
    for (size_t r = 0; r < p.experts.size() && r < kMaxRank; ++r) {
      const bool came = std::find(experts.begin(), experts.end(), p.experts[r]) != experts.end();
      float& mean = came_true_[d][r];
      mean += ((came ? 1.0f : 0.0f) - mean) * kOutcome;
    }
  }
}

std::string Controller::description() const {
  if (mode_ == PrefetchMode::kOff) return "off";
  char text[160];
  const char* state = active_ ? "on" : "off: it did not pay";
  int n = std::snprintf(text, sizeof text, "%s, distance %d, threshold %.2f", state,
                        static_cast<int>(distance_), static_cast<double>(threshold_));
  if (with_s_ > 0 && without_s_ > 0 && n > 0) {
    std::snprintf(text + n, sizeof text - static_cast<size_t>(n), ", %+.1f%% over demand only",
                  100 * (without_s_ / with_s_ - 1));
  }
  return text;
}

}  // namespace stoker
