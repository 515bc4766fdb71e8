#include "runtime/sampling/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <string>

#include "runtime/base/errors.h"
#include "runtime/sampling/vocabulary_loops.h"

namespace stoker {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// The finalizer of SplitMix64 (Steele, Lea, Flood 2014): a bijection that scatters every bit.
uint64_t scatter(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}
constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;

}  // namespace

Sampler::Sampler(int n_vocab, const SamplerOptions& o) : n_vocab_(n_vocab), candidates_(n_vocab) {
  check_option(n_vocab > 0, "n_vocab", "1 or more", n_vocab);
  temperature_ = o.number("temperature", 0.0, 0.0, kLargestNumber, "a number of 0 or more");
  inverse_temperature_ = temperature_ > 0.0 ? std::min(1.0 / temperature_, 1e300) : 0.0;
  logprobs_ = o.logprobs;
  check_option(logprobs_ >= 0 && logprobs_ <= n_vocab, "logprobs",
               "0 to the size of the vocabulary", logprobs_);
  banning_ = !o.logit_bias.empty();
  key_ = scatter(o.seed ^ kGolden);
  logprob_ = kNaN;
  const auto add = [&](std::unique_ptr<SamplerStage> stage) {
    if (stage) stages_.push_back(std::move(stage));
  };
#define STOKER_SAMPLER_STAGE(name) add(make_##name##_stage(n_vocab, o));
#include "runtime/sampling/stages.inc"
#undef STOKER_SAMPLER_STAGE
  o.check_all_read();
  if (temperature_ > 0.0) {
    const double k = o.number("top_k", 0.0);
    candidates_.reserve(std::min<int64_t>(k > 0 ? static_cast<int64_t>(k) : 4096, n_vocab));
  }
  if (logprobs_ > 0) {
    ranking_.reserve(static_cast<size_t>(2 * logprobs_ + 256));
    top_logprobs_.reserve(static_cast<size_t>(logprobs_));
  }
}

int32_t Sampler::peek(const float* logits) {
  const float* adjusted = adjust(logits);
  int32_t token = 0;
  const float max = checked_max(adjusted, &token);
  if (temperature_ > 0.0) {
    candidates_.begin(adjusted, max);
    for (size_t i = 0; i < stages_.size(); ++i) {
      if (stages_[i]->cuts()) stages_[i]->cut(candidates_, uniform(i + 1));
    }
    token = candidates_.draw(uniform(0), inverse_temperature_);
  }
  if (logprobs_ > 0) measure(logits, token);
  return token;
}

void Sampler::commit(int32_t token) {
  accept(token);
  ++draws_;
}

int32_t Sampler::sample(const float* logits) {
  const int32_t token = peek(logits);
  commit(token);
  return token;
}

void Sampler::accept(int32_t token) {
  check_option(token >= 0 && token < n_vocab_, "token", "one of the vocabulary", token);
  for (const auto& stage : stages_) stage->accept(token);
}

int64_t Sampler::history() const {
  int64_t most = 0;
  for (const auto& stage : stages_) {
    const int64_t n = stage->history();
    most = n < 0 || most < 0 ? -1 : std::max(most, n);
  }
  return most;
}

void Sampler::set_mask(std::span<const uint32_t> allowed) {
  for (const auto& stage : stages_) stage->set_mask(allowed);
  masked_ = !allowed.empty();
}

void Sampler::reset() {
  for (const auto& stage : stages_) stage->reset();
  masked_ = false;
  draws_ = 0;
  logprob_ = kNaN;
  top_logprobs_.clear();
}

// Returns the logits as the first stages adjust them; `logits` itself where they change nothing.
const float* Sampler::adjust(const float* logits) {
  bool copied = false;
  for (const auto& stage : stages_) {
    if (!stage->adjusts()) continue;
    if (!copied) adjusted_.assign(logits, logits + n_vocab_);
    copied = true;
    stage->adjust(adjusted_.data());
  }
  return copied ? adjusted_.data() : logits;
}

// Returns the largest logit; `argmax` is the lowest id that has it. Throws where a logit is NaN or
// +inf, or where all are -inf.
float Sampler::checked_max(const float* logits, int32_t* argmax) const {
  constexpr int kStretch = 4096;
  const auto key_range = vocabulary_loops().key_range;
  const int32_t plus_inf = logit_key(std::bit_cast<int32_t>(kInfinity));
  const int32_t minus_inf = logit_key(std::bit_cast<int32_t>(-kInfinity));
  int32_t largest = std::numeric_limits<int32_t>::min();
  int best = 0;  // start of the stretch that has the largest
  bool good = true;
  for (int begin = 0; begin < n_vocab_; begin += kStretch) {
    const KeyRange range = key_range(logits + begin, std::min(kStretch, n_vocab_ - begin));
    good = good && range.least >= minus_inf && range.largest < plus_inf;
    if (range.largest > largest) {
      largest = range.largest;
      best = begin;
    }
  }
  if (!good) {
    const float* bad = std::find_if(logits, logits + n_vocab_,
                                    [](float x) { return std::isnan(x) || x == kInfinity; });
    throw Error(ErrorKind::kModelFile,
                std::string("logits: expected numbers, found ") +
                    (std::isnan(*bad) ? "NaN" : "+inf") + " for token " +
                    std::to_string(bad - logits) +
                    ": the weights are damaged or the computation overflowed");
  }
  const float max = std::bit_cast<float>(logit_key(largest));  // logit_key is its own inverse
  if (max == -kInfinity) {
    if (!banning_ && !masked_) {
      throw Error(ErrorKind::kModelFile,
                  "logits: expected a token to choose, found -inf for all of them");
    }
    throw Error(ErrorKind::kOption, std::string(masked_ ? "mask" : "logit_bias") +
                                        ": expected a token to choose, found -inf for all of them");
  }
  if (max == 0.0f) best = 0;  // -0 equals +0 but has a lower key
  *argmax = static_cast<int32_t>(std::find(logits + best, logits + n_vocab_, max) - logits);
  return max;
}

// Measures log-probabilities of the model's own distribution, before bias, penalties and
// temperature.
void Sampler::measure(const float* logits, int32_t token) {
  int32_t best;
  const float max = checked_max(logits, &best);
  const double log_total = std::log(candidates_.sum_blocks(logits, max, 1.0));
  const auto logprob = [&](float logit) { return static_cast<double>(logit) - max - log_total; };
  logprob_ = logprob(logits[token]);
  candidates_.select(logits, logprobs_, &ranking_);
  top_logprobs_.clear();
  for (const Candidate& c : ranking_) top_logprobs_.emplace_back(c.id, logprob(c.logit));
}

// Returns a number uniform in [0, 1) for the position after those committed. The generator is
// counter-based, so the n-th draw of a seed is always the same. Stream 0 draws the token itself;
// each other stream belongs to a stage.
double Sampler::uniform(uint64_t stream) const {
  const uint64_t key = stream == 0 ? key_ : scatter(key_ ^ scatter(stream));
  return static_cast<double>(scatter(key + kGolden * (draws_ + 1)) >> 11) * 0x1p-53;
}

}  // namespace stoker
