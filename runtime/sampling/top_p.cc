// This stage keeps the fewest tokens, most probable first, whose probabilities reach p (arXiv
// 1904.09751).
#include "runtime/sampling/stage.h"

namespace stoker {

namespace {

class TopP : public SamplerStage {
 public:
  explicit TopP(double p) : p_(p) {}
  bool cuts() const override { return true; }
  void cut(Candidates& candidates, double) override { candidates.keep_mass(p_); }

 private:
  double p_;
};

}  // namespace

std::unique_ptr<SamplerStage> make_top_p_stage(int, const SamplerOptions& o) {
  const double p = o.number("top_p", 1.0, 0.0, 1.0, "a number of 0 to 1");
  if (p == 1.0) return nullptr;
  return std::make_unique<TopP>(p);
}

}  // namespace stoker
