#include "runtime/sampling/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>

#include "kernels_cpu/kernel.h"
#include "kernels_cpu/target.h"
#include "runtime/base/errors.h"

namespace stoker {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kLeastPower = -709.1;  // e to it is taken as 0: 2^-1023 in exp_clamped
constexpr int kLanes = 16;    // independent chains of a reduction: what lets compilers vectorise it
constexpr int kBlock = 1024;  // logits summed as one when drawing from the whole vocabulary

struct KeyRange {
  int32_t least;
  int32_t largest;
};
struct Loops {
  double (*weigh)(const float* logits, int n, double max, double inverse_temperature,
                  double* weights);
  KeyRange (*key_range)(const float* logits, int n);
  int (*find_above)(const float* logits, int begin, int n, float threshold);
};

namespace baseline {
#include "runtime/sampling/sampler_loops.inc"
}  // namespace baseline
#if STOKER_X86
STOKER_BEGIN_AVX2
namespace avx2 {
#include "runtime/sampling/sampler_loops.inc"
}  // namespace avx2
STOKER_END_TARGET
#endif

const Loops& loops() {
#if STOKER_X86
  static const bool wide = active_isa() != Isa::scalar;
  if (wide) return avx2::kLoops;
#endif
  return baseline::kLoops;
}

// The finalizer of SplitMix64 (Steele, Lea, Flood 2014): a bijection that scatters every bit.
uint64_t scatter(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}
constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

void check(bool good, const char* option, const char* expected, double found) {
  if (good) return;
  throw Error(ErrorKind::kOption,
              std::string(option) + ": expected " + expected + ", found " + number(found));
}

}  // namespace

Sampler::Sampler(int n_vocab, const Options& options) : n_vocab_(n_vocab), options_(options) {
  validate();
  const Options& o = options_;
  penalize_ = o.penalty_window != 0 && (o.repetition_penalty != 1.0 || o.frequency_penalty != 0.0 ||
                                        o.presence_penalty != 0.0);
  log_min_p_ = std::log(o.min_p);
  inverse_temperature_ = o.temperature > 0.0 ? std::min(1.0 / o.temperature, 1e300) : 0.0;
  key_ = scatter(o.seed ^ kGolden);
  logprob_ = kNaN;

  if (penalize_ || !o.logit_bias.empty()) adjusted_.resize(n_vocab);
  if (penalize_) {
    occurrences_.resize(n_vocab, Occurrence{0, 0});
    const int tokens = o.penalty_window < 0 ? 4096 : std::min(o.penalty_window, 4096);
    distinct_.reserve(tokens);
    if (o.penalty_window > 0) window_.reserve(tokens);
  }
  if (o.temperature > 0.0) {
    const int64_t k = o.top_k > 0 ? std::min(o.top_k, n_vocab) : std::min(4096, n_vocab);
    candidates_.reserve(2 * k + 256);
    cumulative_.reserve(std::max<int64_t>(k, n_vocab / kBlock + 1));
  }
  if (o.logprobs > 0) {
    ranking_.reserve(2 * o.logprobs + 256);
    top_logprobs_.reserve(o.logprobs);
  }
}

void Sampler::validate() const {
  const Options& o = options_;
  const double inf = std::numeric_limits<double>::infinity();
  check(n_vocab_ > 0, "n_vocab", "1 or more", n_vocab_);
  check(o.temperature >= 0.0 && o.temperature < inf, "temperature", "a number of 0 or more",
        o.temperature);
  check(o.top_k >= 0, "top_k", "0 (off) or more", o.top_k);
  check(o.top_p >= 0.0 && o.top_p <= 1.0, "top_p", "a number of 0 to 1", o.top_p);
  check(o.min_p >= 0.0 && o.min_p <= 1.0, "min_p", "a number of 0 to 1", o.min_p);
  check(o.repetition_penalty > 0.0 && o.repetition_penalty < inf, "repetition_penalty",
        "a number above 0", o.repetition_penalty);
  check(std::isfinite(o.frequency_penalty), "frequency_penalty", "a number", o.frequency_penalty);
  check(std::isfinite(o.presence_penalty), "presence_penalty", "a number", o.presence_penalty);
  check(o.penalty_window >= -1, "penalty_window", "-1 (all), 0 (none) or more", o.penalty_window);
  check(o.logprobs >= 0 && o.logprobs <= n_vocab_, "logprobs", "0 to the size of the vocabulary",
        o.logprobs);
  for (const auto& [token, bias] : o.logit_bias) {
    check(token >= 0 && token < n_vocab_, "logit_bias", "tokens of the vocabulary", token);
    check(bias < inf, "logit_bias", "numbers or -inf", bias);
  }
}

int Sampler::sample(const float* logits) {
  const float* adjusted = adjust(logits);
  int token = 0;
  const float max = checked_max(adjusted, &token);
  if (options_.temperature > 0.0) token = draw(adjusted, max);
  if (options_.logprobs > 0) measure(logits, token);
  if (penalize_) count(token);
  return token;
}

void Sampler::accept(int token) {
  check(token >= 0 && token < n_vocab_, "token", "one of the vocabulary", token);
  if (penalize_) count(token);
}

void Sampler::reset() {
  for (const int32_t token : distinct_) occurrences_[token] = {0, 0};
  distinct_.clear();
  window_.clear();
  counted_ = 0;
  draws_ = 0;
  logprob_ = kNaN;
  top_logprobs_.clear();
}

// What an option has made of a finite logit, in the range of float32: only bans are infinite.
static float bounded(double logit) {
  constexpr double kLargest = std::numeric_limits<float>::max();
  return static_cast<float>(std::clamp(logit, -kLargest, kLargest));
}

// Bias and penalties; returns `logits` itself where there are none.
const float* Sampler::adjust(const float* logits) {
  if (adjusted_.empty()) return logits;
  std::memcpy(adjusted_.data(), logits, n_vocab_ * sizeof(float));
  for (const auto& [token, bias] : options_.logit_bias) {
    if (std::isfinite(adjusted_[token])) {
      adjusted_[token] = bias == -kInfinity ? -kInfinity : bounded(adjusted_[token] + bias);
    }
  }
  for (const int32_t token : distinct_) {
    if (!std::isfinite(adjusted_[token])) continue;  // banned, or of damaged weights
    double logit = adjusted_[token];
    logit = logit > 0.0 ? logit / options_.repetition_penalty : logit * options_.repetition_penalty;
    logit -= occurrences_[token].count * options_.frequency_penalty + options_.presence_penalty;
    adjusted_[token] = bounded(logit);
  }
  return adjusted_.data();
}

// The largest logit and the lowest id that has it. Throws where a logit is NaN or +inf, or where
// all are -inf.
float Sampler::checked_max(const float* logits, int* argmax) const {
  constexpr int kStretch = 4096;
  const auto key_range = loops().key_range;
  const int32_t plus_inf = baseline::order_key(std::bit_cast<int32_t>(kInfinity));
  const int32_t minus_inf = baseline::order_key(std::bit_cast<int32_t>(-kInfinity));
  int32_t largest = std::numeric_limits<int32_t>::min();
  int best = 0;  // start of the stretch that has it
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
  const float max = std::bit_cast<float>(baseline::order_key(largest));  // its own inverse
  if (max == -kInfinity) {
    if (options_.logit_bias.empty()) {
      throw Error(ErrorKind::kModelFile,
                  "logits: expected a token to choose, found -inf for all of them");
    }
    throw Error(ErrorKind::kOption,
                "logit_bias: expected a token to choose, found -inf for all of them");
  }
  if (max == 0.0f) best = 0;  // -0 equals +0 but has a lower key
  *argmax = static_cast<int>(std::find(logits + best, logits + n_vocab_, max) - logits);
  return max;
}

// The k best candidates of finite logit, best first. One pass: what beats the k-th best so far is
// collected, and each time the collection is full it is cut to k again.
void Sampler::select(const float* logits, int64_t k, std::vector<Candidate>* best) const {
  const auto better = [](const Candidate& a, const Candidate& b) {
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
  };
  best->clear();
  const size_t full = static_cast<size_t>(std::min<int64_t>(2 * k + 256, n_vocab_));
  float threshold = -kInfinity;
  const auto cut = [&] {
    if (best->size() <= static_cast<size_t>(k)) return;
    std::nth_element(best->begin(), best->begin() + (k - 1), best->end(), better);
    best->resize(k);
    // A later token of the same logit has a higher id and loses: only larger ones come in.
    threshold = best->back().logit;
  };
  const auto find = loops().find_above;
  for (int i = find(logits, 0, n_vocab_, threshold); i < n_vocab_;
       i = find(logits, i + 1, n_vocab_, threshold)) {
    best->push_back({logits[i], i});
    if (best->size() >= full) cut();
  }
  cut();
  std::sort(best->begin(), best->end(), better);
}

int Sampler::draw(const float* logits, float max) {
  const bool top_p = options_.top_p < 1.0;
  const bool min_p = options_.min_p > 0.0;
  if (options_.top_k > 0 && options_.top_k < n_vocab_) {
    select(logits, options_.top_k, &candidates_);
    if (top_p) cut_top_p(-1.0, max);
  } else if (top_p) {
    take_top_p(logits, max);
  } else if (min_p) {
    take_min_p(logits, max);
  } else {
    return draw_from_all(logits, max);
  }
  if (min_p) {
    const auto improbable = [&](const Candidate& c) {
      return static_cast<double>(c.logit) - max < log_min_p_;
    };
    while (improbable(candidates_.back())) candidates_.pop_back();
  }

  cumulative_.clear();
  double total = 0.0;
  for (const Candidate& c : candidates_) {
    total += baseline::exp_negative((static_cast<double>(c.logit) - max) * inverse_temperature_);
    cumulative_.push_back(total);
  }
  const double target = uniform() * total;
  const auto at = std::upper_bound(cumulative_.begin(), cumulative_.end(), target);
  // uniform() < 1, yet the product can round up to the total: the last token with any weight.
  const auto last = std::lower_bound(cumulative_.begin(), cumulative_.end(), total);
  return candidates_[std::min(at, last) - cumulative_.begin()].id;
}

// Sums of whole blocks first, so that only one block's weights are ever held.
int Sampler::draw_from_all(const float* logits, float max) {
  const double total = sum_blocks(logits, max, inverse_temperature_);
  const double target = uniform() * total;
  const auto last = std::lower_bound(cumulative_.begin(), cumulative_.end(), total);
  const auto at = std::min(std::upper_bound(cumulative_.begin(), cumulative_.end(), target), last);
  const int begin = static_cast<int>(at - cumulative_.begin()) * kBlock;
  const int n = std::min(kBlock, n_vocab_ - begin);
  double weights[kBlock];
  loops().weigh(logits + begin, n, max, inverse_temperature_, weights);
  double sum = at == cumulative_.begin() ? 0.0 : *(at - 1);
  int token = 0;
  for (int i = 0; i < n; ++i) {
    if (weights[i] == 0.0) continue;
    token = i;
    sum += weights[i];
    if (sum > target) break;
  }
  return begin + token;
}

// cumulative_[b] = weights of all tokens up to and with block b; returns the total.
double Sampler::sum_blocks(const float* logits, float max, double inverse_temperature) {
  double weights[kBlock];
  double total = 0.0;
  cumulative_.clear();
  for (int begin = 0; begin < n_vocab_; begin += kBlock) {
    const int n = std::min(kBlock, n_vocab_ - begin);
    total += loops().weigh(logits + begin, n, max, inverse_temperature, weights);
    cumulative_.push_back(total);
  }
  return total;
}

// Top-p over the whole vocabulary: the few best nearly always reach p, so sort no more than that.
void Sampler::take_top_p(const float* logits, float max) {
  const double total = sum_blocks(logits, max, 1.0);
  for (int64_t k = 256;; k *= 4) {
    select(logits, std::min<int64_t>(k, n_vocab_), &candidates_);
    const bool complete = candidates_.size() < static_cast<size_t>(k);
    if (cut_top_p(total, max) || complete) return;
  }
}

// Cuts the sorted candidates to the fewest whose weights reach top_p of `total` (negative: of
// their own sum). False where all of them together do not reach it.
bool Sampler::cut_top_p(double total, float max) {
  const auto weight = [&](const Candidate& c) {
    return baseline::exp_negative(static_cast<double>(c.logit) - max);
  };
  if (total < 0.0) {
    total = 0.0;
    for (const Candidate& c : candidates_) total += weight(c);
  }
  double sum = 0.0;
  for (size_t i = 0; i < candidates_.size(); ++i) {
    sum += weight(candidates_[i]);
    if (sum >= options_.top_p * total) {
      candidates_.resize(i + 1);
      return true;
    }
  }
  return false;
}

// Min-p over the whole vocabulary needs no order: candidates by id.
void Sampler::take_min_p(const float* logits, float max) {
  // Below every float that passes the exact comparison in draw().
  const float below = std::nextafter(static_cast<float>(max + log_min_p_), -kInfinity);
  const auto find = loops().find_above;
  candidates_.clear();
  for (int i = find(logits, 0, n_vocab_, below); i < n_vocab_;
       i = find(logits, i + 1, n_vocab_, below)) {
    if (static_cast<double>(logits[i]) - max >= log_min_p_) candidates_.push_back({logits[i], i});
  }
}

// Log-probabilities of the model's own distribution: before bias, penalties and temperature.
void Sampler::measure(const float* logits, int token) {
  int best;
  const float max = checked_max(logits, &best);
  const double log_total = std::log(sum_blocks(logits, max, 1.0));
  const auto logprob = [&](float logit) { return static_cast<double>(logit) - max - log_total; };
  logprob_ = logprob(logits[token]);
  select(logits, options_.logprobs, &ranking_);
  top_logprobs_.clear();
  for (const Candidate& c : ranking_) top_logprobs_.emplace_back(c.id, logprob(c.logit));
}

void Sampler::count(int token) {
  const int64_t size = options_.penalty_window;
  if (size > 0) {
    if (static_cast<int64_t>(window_.size()) < size) {
      window_.push_back(token);
    } else {
      int32_t& oldest = window_[counted_ % size];
      forget(oldest);
      oldest = token;
    }
  }
  ++counted_;
  Occurrence& occurrence = occurrences_[token];
  if (occurrence.count++ == 0) {
    occurrence.slot = static_cast<int32_t>(distinct_.size());
    distinct_.push_back(token);
  }
}

void Sampler::forget(int token) {
  Occurrence& occurrence = occurrences_[token];
  if (--occurrence.count > 0) return;
  const int32_t moved = distinct_.back();
  distinct_[occurrence.slot] = moved;
  occurrences_[moved].slot = occurrence.slot;
  distinct_.pop_back();
}

// The next draw, uniform in [0, 1): counter-based, so the n-th draw of a seed is always the same.
double Sampler::uniform() {
  return static_cast<double>(scatter(key_ + kGolden * ++draws_) >> 11) * 0x1p-53;
}

}  // namespace stoker
