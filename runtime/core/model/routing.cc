#include "runtime/core/model/routing.h"

#include <algorithm>
#include <cmath>

namespace stoker {

namespace {

constexpr float kLeastSum = 6.103515625e-5f;  // the smallest normal f16, as llama.cpp has it

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// Computes the gate of every expert: p [n].
void gates(Gating gating, int64_t n, const float* logits, float* p) {
  if (gating == Gating::kSigmoid) {
    for (int64_t e = 0; e < n; ++e) p[e] = sigmoid(logits[e]);
    return;
  }
  const float top = *std::max_element(logits, logits + n);
  float sum = 0;
  for (int64_t e = 0; e < n; ++e) sum += p[e] = std::exp(logits[e] - top);
  for (int64_t e = 0; e < n; ++e) p[e] /= sum;
}

// Chooses the k experts of the largest scores [n], the lower one of equals, and marks them in taken
// [n] (0 or 1), whose marked experts cannot be chosen. With NaN scores it takes the first ones.
void take_best(const float* scores, int64_t n, int64_t k, float* taken, int32_t* expert) {
  for (int64_t j = 0; j < k; ++j) {
    int64_t best = -1;
    for (int64_t e = 0; e < n; ++e) {
      if (taken[e] == 0 && (best < 0 || scores[e] > scores[best])) best = e;
    }
    expert[j] = static_cast<int32_t>(best);
    taken[best] = 1;
  }
}

// Marks the experts of all groups but the best as taken. A group's score is the sum of its two
// best; of equal ones the lower group is better.
void take_groups(const Routing& r, const float* scores, int64_t n, float* taken) {
  const int64_t size = n / r.groups;
  std::fill_n(taken, n, 1.0f);
  for (int64_t used = 0; used < r.groups_used; ++used) {
    int64_t best = -1;
    float most = 0;
    for (int64_t g = 0; g < r.groups; ++g) {
      const float* s = scores + g * size;
      if (taken[g * size] == 0) continue;
      float first = s[0], second = -INFINITY;
      for (int64_t i = 1; i < size; ++i) {
        if (s[i] > first) {
          second = first;
          first = s[i];
        } else if (s[i] > second) {
          second = s[i];
        }
      }
      const float score = size > 1 ? first + second : first;
      if (best < 0 || score > most) {
        best = g;
        most = score;
      }
    }
    std::fill_n(taken + best * size, size, 0.0f);
  }
}

float sum_of(const float* p, const int32_t* expert, int64_t k, float* weight) {
  float total = 0;
  for (int64_t j = 0; j < k; ++j) total += weight[j] = p[expert[j]];
  return total;
}

}  // namespace

void choose_experts(const Routing& r, int64_t n, int64_t used, const float* logits,
                    const float* bias, const int32_t* among, float* scratch, int32_t* expert,
                    float* weight) {
  float *p = scratch, *scores = scratch + n, *taken = scratch + 2 * n;
  gates(r.gating, n, logits, p);
  for (int64_t e = 0; e < n; ++e) scores[e] = bias ? p[e] + bias[e] : p[e];
  if (r.groups > 1) {
    take_groups(r, scores, n, taken);
  } else {
    std::fill_n(taken, n, 0.0f);
  }
  take_best(scores, n, used, taken, expert);
  float total = sum_of(p, expert, used, weight);
  const float most = r.normalize ? 1.0f : total;
  if (among) {
    std::fill_n(taken, n, 1.0f);
    for (int64_t j = 0; j < used; ++j) taken[among[j]] = 0;
    take_best(scores, n, used, taken, expert);
    total = sum_of(p, expert, used, weight);
  }
  if (r.gating == Gating::kUnit) std::fill_n(weight, used, 1.0f);
  if (r.normalize || among) {
    if (among && total < kLeastSum) {
      // None of them is likely, but they are all there is. Both gatings are exponential down there.
      std::sort(expert, expert + used, [&](int32_t a, int32_t b) {
        return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
      });
      const float top = logits[expert[0]];
      total = 0;
      for (int64_t j = 0; j < used; ++j) total += weight[j] = std::exp(logits[expert[j]] - top);
    }
    total = std::max(total, kLeastSum) / most;
    for (int64_t j = 0; j < used; ++j) weight[j] /= total;
  }
  if (r.scale != 1) {
    for (int64_t j = 0; j < used; ++j) weight[j] *= r.scale;
  }
}

void selection_scores(const Routing& r, int64_t n, const float* bias, float* logits) {
  if (!bias) return;
  if (r.gating == Gating::kSigmoid) {
    for (int64_t e = 0; e < n; ++e) logits[e] = sigmoid(logits[e]) + bias[e];
    return;
  }
  gates(r.gating, n, logits, logits);
  for (int64_t e = 0; e < n; ++e) logits[e] += bias[e];
}

}  // namespace stoker
