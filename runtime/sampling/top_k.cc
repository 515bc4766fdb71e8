// This stage keeps the k largest logits; of equal ones it prefers the lower ids.
#include <cmath>

#include "runtime/sampling/stage.h"

namespace stoker {

namespace {

class TopK : public SamplerStage {
 public:
  explicit TopK(int64_t k) : k_(k) {}
  bool cuts() const override { return true; }
  void cut(Candidates& candidates, double) override { candidates.keep_best(k_); }

 private:
  int64_t k_;
};

}  // namespace

std::unique_ptr<SamplerStage> make_top_k_stage(int n_vocab, const SamplerOptions& o) {
  const auto k = static_cast<int64_t>(o.number("top_k", 0, 0, kLargestNumber, "0 (off) or more"));
  if (k == 0 || k >= n_vocab) return nullptr;
  return std::make_unique<TopK>(k);
}

}  // namespace stoker
