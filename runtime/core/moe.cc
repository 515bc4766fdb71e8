// The mixture blocks of Forward: router, routed experts through the expert store, shared expert.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "runtime/core/errors.h"
#include "runtime/core/forward.h"

namespace stoker {

namespace {

bool int8(const Matrix& m) { return m.format->act == ActKind::i8; }

// Chooses the k largest probabilities, ties to the lower expert, and their weights.
void choose(const ModelConfig& c, const float* logits, float* p, int32_t* expert, float* weight) {
  const int64_t n = c.n_expert, k = c.n_expert_used;
  if (c.gating == Gating::kSigmoid) {
    for (int64_t e = 0; e < n; ++e) p[e] = 1.0f / (1.0f + std::exp(-logits[e]));
  } else {
    const float top = *std::max_element(logits, logits + n);
    float sum = 0;
    for (int64_t e = 0; e < n; ++e) sum += p[e] = std::exp(logits[e] - top);
    for (int64_t e = 0; e < n; ++e) p[e] /= sum;
  }
  float total = 0;
  for (int64_t j = 0; j < k; ++j) {
    // A chosen expert's probability is replaced by -1; NaN logits choose the first ones left.
    int64_t best = -1;
    for (int64_t e = 0; e < n; ++e) {
      if (p[e] != -1.0f && (best < 0 || p[e] > p[best])) best = e;
    }
    expert[j] = static_cast<int32_t>(best);
    weight[j] = p[best];
    total += p[best];
    p[best] = -1.0f;
  }
  if (!c.normalize_experts) return;
  total = std::max(total, 6.103515625e-5f);  // the smallest normal f16, as llama.cpp has it
  for (int64_t j = 0; j < k; ++j) weight[j] /= total;
}

}  // namespace

class Forward::Ahead : public RouterAhead {
 public:
  explicit Ahead(Forward& forward) : f_(forward) {}
  void logits(int64_t layer, float* out) override {
    const ModelConfig& c = f_.config_;
    const Matrix& router = f_.layer(layer).router;
    const float* in = f_.s_.x;
    if (!c.routes_early) {
      f_.norm(in, f_.layer(layer).ffn_norm, f_.s_.ahead);
      in = f_.s_.ahead;
    }
    const Input x = f_.input(in, f_.n_, c.n_embd, int8(router), false);
    const Product product[] = {{&router, out, c.n_expert, nullptr, 0, f_.n_}};
    f_.multiply(product, x);
  }
  const float* hidden() const override { return f_.s_.x; }

 private:
  Forward& f_;
};

void Forward::look_ahead_first() {
  Ahead ahead(*this);
  experts().look_ahead(-1, ahead);
}

void Forward::announce(int64_t il, const Routes& routes) { experts().announce(il, routes); }

Routes Forward::route(int64_t il, const float* in) {
  copy_to_tap(il, in);
  const ModelConfig& c = config_;
  const Matrix& router = layer(il).router;
  const Input x = input(in, n_, c.n_embd, int8(router), two_terms(Precision::kBalanced));
  const Product product[] = {{&router, s_.router, c.n_expert, nullptr, 0, n_}};
  multiply(product, x);
  Routes r;
  r.expert.resize(static_cast<size_t>(n_ * c.n_expert_used));
  r.weight.resize(r.expert.size());
  for_rows(n_, 8 * c.n_expert, [&](int64_t i, int thread) {
    choose(c, s_.router + i * c.n_expert, reinterpret_cast<float*>(thread_scratch(thread)),
           r.expert.data() + i * c.n_expert_used, r.weight.data() + i * c.n_expert_used);
  });
  return r;
}

void Forward::mixture(int64_t il, const float* in, const Routes& routes, float* out) {
  copy_hidden_to_tap(il);
  const ModelConfig& c = config_;
  const int64_t k = c.n_expert_used, pairs = n_ * k, ff = c.n_ff_expert;

  // Pairs (token, slot) sorted by expert: those of experts[j] are order[begin[j] .. begin[j+1]).
  std::vector<int32_t> order(static_cast<size_t>(pairs));
  std::vector<int32_t> count(static_cast<size_t>(c.n_expert) + 1, 0);
  for (int32_t e : routes.expert) ++count[static_cast<size_t>(e) + 1];
  std::vector<int32_t> experts, begin;
  for (int64_t e = 0; e < c.n_expert; ++e) {
    const size_t i = static_cast<size_t>(e);
    if (count[i + 1] > 0) {
      experts.push_back(static_cast<int32_t>(e));
      begin.push_back(count[i]);
    }
    count[i + 1] += count[i];
  }
  begin.push_back(static_cast<int32_t>(pairs));
  for (int64_t p = 0; p < pairs; ++p) {
    const size_t e = static_cast<size_t>(routes.expert[static_cast<size_t>(p)]);
    order[static_cast<size_t>(count[e]++)] = static_cast<int32_t>(p);
  }
  std::vector<int32_t> token(order.size()), row_of_pair(order.size());
  for (size_t i = 0; i < order.size(); ++i) {
    token[i] = order[i] / static_cast<int32_t>(k);
    row_of_pair[static_cast<size_t>(order[i])] = static_cast<int32_t>(i);
  }

  // Experts are computed in the order in which they become ready; their outputs wait in
  // s_.pairs, so that the sum below does not depend on that order.
  const std::unique_ptr<ExpertLease> lease = this->experts().acquire(il, experts, routes);
  Ahead ahead(*this);
  this->experts().look_ahead(il, ahead);
  const bool high = two_terms(Precision::kHigh);
  std::vector<Product> gate_up, down;
  std::vector<int32_t> rows;  // pairs whose experts are ready
  for (;;) {
    const std::span<const int32_t> ready = lease->next_ready();
    if (ready.empty()) break;
    gate_up.clear();
    down.clear();
    rows.clear();
    bool quantize_in = false, quantize_hidden = false;
    for (int32_t j : ready) {
      const Expert& e = lease->expert(j);
      const size_t i = static_cast<size_t>(j);
      const int64_t first = begin[i], n = begin[i + 1] - first;
      const int32_t* list = token.data() + first;
      for (int64_t r = first; r < first + n; ++r) rows.push_back(static_cast<int32_t>(r));
      gate_up.push_back({&e.gate, s_.gate + first * ff, ff, list, 0, n});
      gate_up.push_back({&e.up, s_.up + first * ff, ff, list, 0, n});
      down.push_back({&e.down, s_.pairs + first * c.n_embd, c.n_embd, nullptr, first, n});
      quantize_in |= int8(e.gate) || int8(e.up);
      quantize_hidden |= int8(e.down);
    }
    multiply(gate_up, input(in, n_, c.n_embd, quantize_in, high));
    gate_rows(s_.gate, s_.up, pairs, ff, rows);
    multiply(down, input(s_.gate, pairs, ff, quantize_hidden, high, rows));
  }
  for_rows(n_, c.n_embd * k, [&](int64_t i, int) {
    float* y = out + i * c.n_embd;
    std::memset(y, 0, static_cast<size_t>(c.n_embd) * sizeof(float));
    for (int64_t j = 0; j < k; ++j) {
      const size_t pair = static_cast<size_t>(i * k + j);
      ops_.add_scaled(y, s_.pairs + row_of_pair[pair] * c.n_embd, routes.weight[pair], c.n_embd);
    }
  });
  if (layer(il).shared_gate) shared_expert(il, in, out);
}

void Forward::shared_expert(int64_t il, const float* in, float* out) {
  const ModelConfig& c = config_;
  const LayerWeights& w = layer(il);
  const int64_t ff = c.n_ff_shared;
  const bool high = two_terms(Precision::kHigh);
  const Input x = input(in, n_, c.n_embd,
                        int8(w.shared_gate) || int8(w.shared_up) || int8(w.shared_router), high);
  const Product products[] = {{&w.shared_gate, s_.gate, ff, nullptr, 0, n_},
                              {&w.shared_up, s_.up, ff, nullptr, 0, n_},
                              {&w.shared_router, s_.router, 1, nullptr, 0, n_}};
  multiply(products, x);
  gate_rows(s_.gate, s_.up, n_, ff);
  const Input h = input(s_.gate, n_, ff, int8(w.shared_down), high);
  const Product down[] = {{&w.shared_down, s_.pairs, c.n_embd, nullptr, 0, n_}};
  multiply(down, h);
  for_rows(n_, c.n_embd, [&](int64_t i, int) {
    const float weight = 1.0f / (1.0f + std::exp(-s_.router[i]));
    ops_.add_scaled(out + i * c.n_embd, s_.pairs + i * c.n_embd, weight, c.n_embd);
  });
}

}  // namespace stoker
