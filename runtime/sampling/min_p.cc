// This stage keeps the tokens with p(token) >= min_p * p(most probable) (arXiv 2407.01082).
#include <cmath>

#include "runtime/sampling/stage.h"

namespace stoker {

namespace {

class MinP : public SamplerStage {
 public:
  explicit MinP(double p) : log_p_(std::log(p)) {}
  bool cuts() const override { return true; }
  void cut(Candidates& candidates, double) override { candidates.keep_within(log_p_); }

 private:
  double log_p_;
};

}  // namespace

std::unique_ptr<SamplerStage> make_min_p_stage(int, const SamplerOptions& o) {
  const double p = o.number("min_p", 0.0, 0.0, 1.0, "a number of 0 to 1");
  if (p == 0.0) return nullptr;
  return std::make_unique<MinP>(p);
}

}  // namespace stoker
