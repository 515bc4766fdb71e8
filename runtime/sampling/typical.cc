// This stage keeps the locally typical tokens (arXiv 2202.00666): those whose surprise is nearest
// to the distribution's entropy, the fewest whose probabilities together exceed p.
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "runtime/sampling/stage.h"
#include "runtime/sampling/vocabulary_loops.h"

namespace stoker {

namespace {

class Typical : public SamplerStage {
 public:
  explicit Typical(double p) : p_(p) {}
  bool cuts() const override { return true; }

  void cut(Candidates& candidates, double) override {
    std::vector<Candidate>& list = candidates.sorted();
    probability_.clear();
    double total = 0.0;
    for (const Candidate& c : list) {
      probability_.push_back(exp_negative(static_cast<double>(c.logit) - list.front().logit));
      total += probability_.back();
    }
    double entropy = 0.0;
    for (double& p : probability_) {
      p /= total;
      if (p > 0.0) entropy -= p * std::log(p);
    }
    order_.clear();
    for (size_t i = 0; i < list.size(); ++i) {
      const double p = probability_[i];
      order_.push_back({p > 0.0 ? std::abs(-std::log(p) - entropy) : INFINITY, i});
    }
    std::sort(order_.begin(), order_.end());  // ties: the likelier first
    double sum = 0.0;
    size_t kept = 0;
    while (kept < order_.size() && sum <= p_) sum += probability_[order_[kept++].second];
    order_.resize(kept);
    std::sort(order_.begin(), order_.end(),
              [](const auto& a, const auto& b) { return a.second < b.second; });
    for (size_t i = 0; i < kept; ++i) list[i] = list[order_[i].second];
    list.resize(kept);
  }

 private:
  double p_;
  std::vector<double> probability_;
  std::vector<std::pair<double, size_t>> order_;  // distance from the entropy, index in the list
};

}  // namespace

std::unique_ptr<SamplerStage> make_typical_stage(int, const SamplerOptions& o) {
  const double p = o.number("typical_p", 1.0, 0.0, 1.0, "a number of 0 to 1");
  if (p == 1.0) return nullptr;
  return std::make_unique<Typical>(p);
}

}  // namespace stoker
