#include "offload/controller.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>

namespace stoker {

namespace {

// The weight of one more outcome in a decayed mean.
constexpr float kOutcome = 1.0f / 16;
// Scores are binned in steps of this many spreads.
constexpr float kStep = 0.2f;
// The share of the time that the disk should be busy, and how fast the threshold follows.
constexpr double kBusy = 0.9;
constexpr float kThresholdGain = 0.15f;
constexpr float kLeastThreshold = 0.5f, kMostThreshold = 0.97f;
// A trial compares this many tokens of the other side with as many just before it; it ends early
// where a few tokens are slower by a clear share.
constexpr int64_t kTrial = 12;
constexpr size_t kShortTrial = 4;
constexpr double kClearly = 0.2;
// The cache fills before the first trial; later trials become rarer while their outcome stays the
// same.
constexpr int64_t kFirstTrial = 24;
constexpr int64_t kMaxBackoff = 16;
// The side in use is kept unless the other one is faster by this share.
constexpr double kGain = 0.01;

}  // namespace

Controller::Controller(const PredictorShape& shape, PrefetchMode mode)
    : shape_(shape), mode_(mode), active_(mode != PrefetchMode::kOff) {
  width_ = std::min(shape.n_expert, 2 * shape.n_expert_used);
  // Initial probabilities: one half at a score of 0, nearly 1 far above it. Experts that are not in
  // memory start at half of that, because the predictor may be worthless for this model.
  Record record;
  for (size_t d = 0; d < kMaxDistance; ++d) {
    for (int b = 0; b < kBins; ++b) {
      const float score = (static_cast<float>(b) - kBins / 2 + 0.5f) * kStep;
      const float p = 1 / (1 + std::exp(-3 * score / (1 + 0.3f * static_cast<float>(d))));
      record[d][0][static_cast<size_t>(b)] = 0.5f * p;
      record[d][1][static_cast<size_t>(b)] = 0.95f * p;
    }
  }
  // A guess from the token history is surer the longer the occurrence is.
  for (size_t b = 0; b < kBins; ++b) {
    const float p = 1 - 0.6f / static_cast<float>(b + 1);
    record[kRememberedNow][0][b] = record[kRememberedNext][0][b] = 0.9f * p;
    record[kRememberedNow][1][b] = record[kRememberedNext][1][b] = p;
  }
  came_true_.assign(static_cast<size_t>(shape.n_layer), record);
  pending_.resize(static_cast<size_t>(shape.n_layer));
  phase_left_ = kFirstTrial;
}

int Controller::bin(float score) {
  const float b = std::floor(score / kStep) + static_cast<float>(kBins / 2);
  return static_cast<int>(std::clamp(b, 0.0f, static_cast<float>(kBins - 1)));
}

void Controller::begin(const Step& step, double now_s, double busy_s) {
  prompt_ = step.is_prompt();
  if (!prompt_ && rows_ != step.size()) {
    // Steps of different sizes take different times: the comparison begins anew.
    if (rows_ > 0) token_s_ = with_s_ = without_s_ = 0;
    if (trial_) active_ = !active_;
    trial_ = false;
    times_.clear();
    phase_left_ = std::max(phase_left_, kTrial);
    rows_ = step.size();
  }
  began_s_ = now_s;
  busy_s_ = busy_s;
  for (auto& layer : pending_) {
    for (size_t k = 0; k < kKinds; ++k) {
      if (k != kRememberedNext || prompt_) layer[k].made = false;
    }
  }
}

void Controller::end(double now_s, double busy_s) {
  const double seconds = now_s - began_s_;
  if (!prompt_ && seconds > 0) weigh(seconds, std::min(1.0, (busy_s - busy_s_) / seconds));
}

void Controller::weigh(double token_s, double busy_share) {
  // A useless read costs next to nothing where the disk is idle, and its full time where the disk
  // never rests: only guesses that are sure enough to keep it busy are worth reading.
  threshold_ += kThresholdGain * static_cast<float>(busy_share - kBusy);
  threshold_ = std::clamp(threshold_, kLeastThreshold, kMostThreshold);
  token_s_ = token_s_ == 0 ? token_s : token_s_ + (token_s - token_s_) / 16;
  const double layers = read_s_ / (token_s_ / static_cast<double>(shape_.n_layer));
  distance_ = std::clamp<int64_t>(static_cast<int64_t>(layers + 0.75), 1, kMaxDistance);
  if (mode_ != PrefetchMode::kAuto) return;
  times_.push_back(token_s);
  if (--phase_left_ > 0 && !loses_clearly()) return;
  // Only the last tokens of the phase count: the first ones are still affected by the phase before.
  const size_t n = std::min(times_.size(), static_cast<size_t>(kTrial - kTrial / 4));
  const double mean = std::accumulate(times_.end() - static_cast<int64_t>(n), times_.end(), 0.0) /
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
    backoff_ = 1;  // the other side is faster, so it is kept
  } else {
    active_ = !active_;
    backoff_ = std::min(2 * backoff_, kMaxBackoff);
  }
  phase_left_ = backoff_ * 4 * kTrial;
}

bool Controller::loses_clearly() const {
  if (!trial_ || times_.size() < kShortTrial) return false;
  const double sum = std::accumulate(times_.begin(), times_.end(), 0.0);
  return sum >
         (1 + kClearly) * (active_ ? without_s_ : with_s_) * static_cast<double>(times_.size());
}

void Controller::guessed(int64_t layer, const Guess& guess, std::span<const uint8_t> resident,
                         std::vector<float>* probability) {
  const size_t n = guess.experts.size();
  probability->assign(n, 1.0f);
  if (prompt_) return;  // in a prompt nothing is known, and nearly all experts are used
  const int64_t ahead = std::clamp<int64_t>(guess.layer - layer, 1, kMaxDistance);
  const size_t kind = !guess.remembered               ? static_cast<size_t>(ahead - 1)
                      : guess.layer >= shape_.n_layer ? kRememberedNext
                                                      : kRememberedNow;
  const size_t of = static_cast<size_t>(guess.layer % shape_.n_layer);
  Record& record = came_true_[guess.remembered ? 0 : of];
  Pending& p = pending_[of][kind];
  p.made = true;
  p.experts.assign(guess.experts.begin(), guess.experts.end());
  p.came_true.resize(n);
  for (size_t i = 0; i < n; ++i) {
    const int b = guess.remembered
                      ? std::clamp(static_cast<int>(guess.score[i]), 0, static_cast<int>(kBins) - 1)
                      : bin(guess.score[i]);
    p.came_true[i] = &record[kind][resident[i] ? 1 : 0][static_cast<size_t>(b)];
    (*probability)[i] = *p.came_true[i];
  }
}

void Controller::judge(int64_t layer, std::span<const int32_t> experts) {
  for (Pending& p : pending_[static_cast<size_t>(layer)]) {
    if (!p.made) continue;
    p.made = false;
    for (size_t i = 0; i < p.experts.size(); ++i) {
      const bool came = std::find(experts.begin(), experts.end(), p.experts[i]) != experts.end();
      *p.came_true[i] += ((came ? 1.0f : 0.0f) - *p.came_true[i]) * kOutcome;
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
