// The mixture blocks of Forward: router, routed experts through the expert store, shared expert.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>

#include "runtime/base/errors.h"
#include "runtime/core/forward.h"

namespace stoker {

namespace {

using Where = Routing::Where;

bool int8(const Matrix& m) { return m.format->act == ActKind::i8; }

}  // namespace

class Forward::Probe : public RouterProbe {
 public:
  explicit Probe(Forward& forward) : f_(forward) {}
  void logits(int64_t layer, float* out) override {
    Observer* const observer = std::exchange(f_.observer_, nullptr);  // a guess is not counted
    guess(layer, out);
    f_.observer_ = observer;
  }
  const float* hidden() const override { return f_.s_.x; }

 private:
  void guess(int64_t layer, float* out) {
    const ModelConfig& c = f_.config_;
    // The choice is made at the layer, or at the mixture before it.
    const int64_t before = c.routing.pregated ? f_.mixture_before(layer) : -1;
    const LayerWeights& w = f_.layer(before < 0 ? layer : before);
    const Matrix& router = before < 0 ? w.router : w.pregate;
    const float* in = f_.s_.x;
    if (c.routing.where == Where::kFeedForward) {
      f_.norm(in, w.ffn_norm, f_.s_.ahead);
      in = f_.s_.ahead;
    }
    const Input x = f_.input(in, f_.n_, c.n_embd, int8(router), 0);
    if (before >= 0) return f_.pregate(before, x, out);
    const Product product[] = {{&router, out, c.n_expert, nullptr, 0, f_.n_}};
    f_.multiply(product, x);
    const float* bias = w.router_bias.empty() ? nullptr : w.router_bias.data();
    for (int64_t i = 0; bias && i < f_.n_; ++i) {
      selection_scores(c.routing, c.n_expert, bias, out + i * c.n_expert);
    }
  }

  Forward& f_;
};

void Forward::look_ahead_first() {
  if (config_.routing.where == Where::kOnce) return;
  Probe ahead(*this);
  experts().look_ahead(-1, ahead);
}

Routes Forward::route(int64_t il, const float* in) {
  if (observer_) observer_->block_input(il, in);
  const ModelConfig& c = config_;
  const Matrix& router = layer(il).router;
  const Matrix& gate = layer(il).pregate;
  const Input x =
      input(in, n_, c.n_embd, int8(router) || (gate && int8(gate)), low_rows(least(router)));
  const Product product[] = {{&router, s_.router, c.n_expert, nullptr, 0, n_}};
  multiply(product, x);
  const Routes routes = chosen(il, pregated_);
  if (c.routing.where == Where::kLayerInput && pregated_.empty())
    experts().prefetch_certain(il, routes);
  pregated_.clear();
  if (gate) {
    pregate(il, x, s_.router);
    Routes next = chosen(mixture_after(il));
    experts().prefetch_certain(mixture_after(il), next);
    pregated_ = std::move(next.expert);
  }
  return routes;
}

void Forward::pregate(int64_t il, const Input& in, float* logits) {
  const LayerWeights& w = layer(il);
  const int64_t n = config_.n_expert;
  const Product product[] = {{&w.pregate, logits, n, nullptr, 0, n_}};
  multiply(product, in);
  for_rows(n_, n, [&](int64_t i, int) { ops_.add(logits + i * n, w.pregate_bias.data(), n); });
}

int64_t Forward::mixture_before(int64_t il) const {
  while (--il >= 0 && !layer(il).mixture) {
  }
  return il;
}

int64_t Forward::mixture_after(int64_t il) const {
  while (++il < config_.n_layer && !layer(il).mixture) {
  }
  return il;
}

void Forward::route_once() {
  const ModelConfig& c = config_;
  const Weights& w = engine_.weights();
  const int64_t two = low_rows(least(w.router_up));
  norm(s_.x, w.router_norm, s_.a);
  const Input x = input(s_.a, n_, c.n_embd, int8(w.router_up), two);
  const Product up[] = {{&w.router_up, s_.gate, c.routing.n_hidden, nullptr, 0, n_}};
  multiply(up, x);
  for_rows(n_, c.routing.n_hidden, [&](int64_t i, int) {
    float* row = s_.gate + i * c.routing.n_hidden;
    for (int64_t j = 0; j < c.routing.n_hidden; ++j) row[j] = std::max(row[j], 0.0f);
  });
  const Input h = input(s_.gate, n_, c.routing.n_hidden, int8(w.router_down), two);
  const Product down[] = {{&w.router_down, s_.router, c.n_expert, nullptr, 0, n_}};
  multiply(down, h);
  routes_kept_ = chosen(1);
  for (int64_t il = 1; il < c.n_layer; ++il) experts().prefetch_certain(il, routes_kept_);
}

Routes Forward::chosen(int64_t il, const std::vector<int32_t>& among) {
  const ModelConfig& c = config_;
  const Vector& bias = layer(il).router_bias;
  Routes r;
  r.expert.resize(static_cast<size_t>(n_ * c.n_expert_used));
  r.weight.resize(r.expert.size());
  for_rows(n_, 8 * c.n_expert, [&](int64_t i, int thread) {
    const int64_t at = i * c.n_expert_used;
    choose_experts(c.routing, c.n_expert, c.n_expert_used, s_.router + i * c.n_expert,
                   bias.empty() ? nullptr : bias.data(),
                   among.empty() ? nullptr : among.data() + at,
                   reinterpret_cast<float*>(thread_scratch(thread)), r.expert.data() + at,
                   r.weight.data() + at);
  });
  return r;
}

void Forward::mixture(int64_t il, const float* in, const Routes& routes, float* out) {
  if (observer_) {
    observer_->hidden(il, s_.x);
    if (config_.routing.where == Where::kOnce) observer_->block_input(il, in);
  }
  const ModelConfig& c = config_;
  const int64_t k = c.n_expert_used, pairs = n_ * k, ff = c.n_ff_expert;

  // The pairs (token, slot) are sorted by expert: experts[j] has order[begin[j] .. begin[j+1]).
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
  if (config_.routing.where != Where::kOnce) {  // else there is nothing to guess
    Probe ahead(*this);
    this->experts().look_ahead(il, ahead);
  }
  const int64_t low = low_rows(Precision::kHigh);
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
      const int64_t n_low = std::lower_bound(list, list + n, low) - list;
      down.push_back({&e.down, s_.pairs + first * c.n_embd, c.n_embd, nullptr, first, n, n_low});
      quantize_in |= int8(e.gate) || int8(e.up);
      quantize_hidden |= int8(e.down);
    }
    multiply(gate_up, input(in, n_, c.n_embd, quantize_in, low));
    gate_rows(s_.gate, s_.up, pairs, ff, rows);
    multiply(down, input(s_.gate, pairs, ff, quantize_hidden, low, rows, token.data()));
  }
  for_rows(n_, c.n_embd * k, [&](int64_t i, int) {
    float* y = out + i * c.n_embd;
    std::memset(y, 0, static_cast<size_t>(c.n_embd) * sizeof(float));
    for (int64_t j = 0; j < k; ++j) {
      const size_t pair = static_cast<size_t>(i * k + j);
      ops_.add_scaled(y, s_.pairs + row_of_pair[pair] * c.n_embd, routes.weight[pair], c.n_embd);
    }
  });
  if (c.n_ff_shared > 0) shared_expert(il, in, out);
}

void Forward::shared_expert(int64_t il, const float* in, float* out) {
  const ModelConfig& c = config_;
  const LayerWeights& w = layer(il);
  const int64_t ff = c.n_ff_shared;
  const int64_t low = low_rows(Precision::kHigh);
  const bool weighed = static_cast<bool>(w.shared_router);
  const bool quantize =
      int8(w.shared_gate) || int8(w.shared_up) || (weighed && int8(w.shared_router));
  const Input x = input(in, n_, c.n_embd, quantize, low);
  const Product products[] = {{&w.shared_gate, s_.gate, ff, nullptr, 0, n_},
                              {&w.shared_up, s_.up, ff, nullptr, 0, n_},
                              {&w.shared_router, s_.router, 1, nullptr, 0, n_}};
  multiply(std::span(products, weighed ? 3 : 2), x);
  gate_rows(s_.gate, s_.up, n_, ff);
  const Input h = input(s_.gate, n_, ff, int8(w.shared_down), low);
  const Product down[] = {{&w.shared_down, s_.pairs, c.n_embd, nullptr, 0, n_}};
  multiply(down, h);
  for_rows(n_, c.n_embd, [&](int64_t i, int) {
    const float weight = weighed ? 1.0f / (1.0f + std::exp(-s_.router[i])) : 1.0f;
    ops_.add_scaled(out + i * c.n_embd, s_.pairs + i * c.n_embd, weight, c.n_embd);
  });
}

}  // namespace stoker
