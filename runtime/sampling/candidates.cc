#include "runtime/sampling/candidates.h"

#include <algorithm>
#include <cmath>

#include "runtime/sampling/vocabulary_loops.h"

namespace stoker {

namespace {

bool better(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

}  // namespace

void Candidates::reserve(int64_t k) {
  list_.reserve(static_cast<size_t>(2 * k + 256));
  cumulative_.reserve(static_cast<size_t>(std::max<int64_t>(k, n_vocab_ / kSumBlock + 1)));
}

void Candidates::begin(const float* logits, float max) {
  logits_ = logits;
  max_ = max;
  whole_ = true;
  sorted_ = false;
}

// The selection takes one pass: it collects what beats the k-th best so far, and cuts the
// collection to k again each time it is full.
void Candidates::select(const float* logits, int64_t k, std::vector<Candidate>* best) const {
  best->clear();
  const size_t full = static_cast<size_t>(std::min<int64_t>(2 * k + 256, n_vocab_));
  float threshold = -INFINITY;
  const auto cut = [&] {
    if (best->size() <= static_cast<size_t>(k)) return;
    std::nth_element(best->begin(), best->begin() + (k - 1), best->end(), better);
    best->resize(static_cast<size_t>(k));
    // A later token of the same logit has a higher id and loses, so only larger logits enter.
    threshold = best->back().logit;
  };
  const auto find = vocabulary_loops().find_above;
  for (int i = find(logits, 0, n_vocab_, threshold); i < n_vocab_;
       i = find(logits, i + 1, n_vocab_, threshold)) {
    best->push_back({logits[i], i});
    if (best->size() >= full) cut();
  }
  cut();
  std::sort(best->begin(), best->end(), better);
}

void Candidates::keep_best(int64_t k) {
  if (whole_) {
    select(logits_, k, &list_);
    whole_ = false;
    sorted_ = true;
  } else {
    std::vector<Candidate>& list = sorted();
    if (static_cast<int64_t>(list.size()) > k) list.resize(static_cast<size_t>(k));
  }
}

// The few best of the whole vocabulary nearly always reach p, so no more than those are sorted.
void Candidates::keep_mass(double p) {
  if (!whole_) {
    sorted();
    cut_mass(p, -1.0);
    return;
  }
  const double total = sum_blocks(logits_, max_, 1.0);
  whole_ = false;
  sorted_ = true;
  for (int64_t k = 256;; k *= 4) {
    select(logits_, std::min<int64_t>(k, n_vocab_), &list_);
    const bool complete = list_.size() < static_cast<size_t>(k);
    if (cut_mass(p, total) || complete) return;
  }
}

// Cuts the sorted list to the fewest whose weights reach p of `total` (of the list's own sum where
// `total` is negative). Returns false where all of them together do not reach it.
bool Candidates::cut_mass(double p, double total) {
  const double top = max();
  const auto weight = [&](const Candidate& c) {
    return exp_negative(static_cast<double>(c.logit) - top);
  };
  if (total < 0.0) {
    total = 0.0;
    for (const Candidate& c : list_) total += weight(c);
  }
  double sum = 0.0;
  for (size_t i = 0; i < list_.size(); ++i) {
    sum += weight(list_[i]);
    if (sum >= p * total) {
      list_.resize(i + 1);
      return true;
    }
  }
  return false;
}

// This needs no sorting: over the whole vocabulary the list that it leaves is in order of id.
void Candidates::keep_within(double log_p) {
  const double top = max();
  const auto probable = [&](const Candidate& c) {
    return static_cast<double>(c.logit) - top >= log_p;
  };
  if (!whole_) {
    std::erase_if(list_, [&](const Candidate& c) { return !probable(c); });
    return;
  }
  // This threshold is below every float that passes the exact comparison.
  const float below = std::nextafter(static_cast<float>(top + log_p), -INFINITY);
  const auto find = vocabulary_loops().find_above;
  list_.clear();
  for (int i = find(logits_, 0, n_vocab_, below); i < n_vocab_;
       i = find(logits_, i + 1, n_vocab_, below)) {
    const Candidate c{logits_[i], i};
    if (probable(c)) list_.push_back(c);
  }
  whole_ = false;
  sorted_ = false;
}

std::vector<Candidate>& Candidates::sorted() {
  if (whole_) {
    select(logits_, n_vocab_, &list_);
  } else if (!sorted_) {
    std::sort(list_.begin(), list_.end(), better);
  }
  whole_ = false;
  sorted_ = true;
  return list_;
}

int32_t Candidates::draw(double uniform, double inverse_temperature) {
  if (whole_) return draw_from_all(uniform, inverse_temperature);
  const double top = max();
  cumulative_.clear();
  double total = 0.0;
  for (const Candidate& c : list_) {
    total += exp_negative((static_cast<double>(c.logit) - top) * inverse_temperature);
    cumulative_.push_back(total);
  }
  const double target = uniform * total;
  const auto at = std::upper_bound(cumulative_.begin(), cumulative_.end(), target);
  // Although uniform < 1, the product can round up to the total; that draws the last token that
  // has any weight.
  const auto last = std::lower_bound(cumulative_.begin(), cumulative_.end(), total);
  return list_[static_cast<size_t>(std::min(at, last) - cumulative_.begin())].id;
}

// Whole blocks are summed first, so that only one block's weights are held at a time.
int32_t Candidates::draw_from_all(double uniform, double inverse_temperature) {
  const double total = sum_blocks(logits_, max_, inverse_temperature);
  const double target = uniform * total;
  const auto last = std::lower_bound(cumulative_.begin(), cumulative_.end(), total);
  const auto at = std::min(std::upper_bound(cumulative_.begin(), cumulative_.end(), target), last);
  const int begin = static_cast<int>(at - cumulative_.begin()) * kSumBlock;
  const int n = std::min(kSumBlock, n_vocab_ - begin);
  double weights[kSumBlock];
  vocabulary_loops().weigh(logits_ + begin, n, max_, inverse_temperature, weights);
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

double Candidates::sum_blocks(const float* logits, float max, double inverse_temperature) {
  double weights[kSumBlock];
  double total = 0.0;
  cumulative_.clear();
  for (int begin = 0; begin < n_vocab_; begin += kSumBlock) {
    const int n = std::min(kSumBlock, n_vocab_ - begin);
    total += vocabulary_loops().weigh(logits + begin, n, max, inverse_temperature, weights);
    cumulative_.push_back(total);
  }
  return total;
}

}  // namespace stoker
