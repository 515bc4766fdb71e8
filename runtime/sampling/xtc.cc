// Exclude top choices (github.com/oobabooga/text-generation-webui/pull/6335): with some probability
// this stage removes all tokens above a threshold but the least likely of them.
#include <cstddef>
#include <vector>

#include "runtime/sampling/stage.h"
#include "runtime/sampling/vocabulary_loops.h"

namespace stoker {

namespace {

class Xtc : public SamplerStage {
 public:
  Xtc(double probability, double threshold) : probability_(probability), threshold_(threshold) {}
  bool cuts() const override { return true; }

  void cut(Candidates& candidates, double draw) override {
    if (draw >= probability_) return;
    std::vector<Candidate>& list = candidates.sorted();
    const double top = list.front().logit;
    double total = 0.0;
    for (const Candidate& c : list) total += exp_negative(c.logit - top);
    size_t above = 0;
    while (above < list.size() && exp_negative(list[above].logit - top) >= threshold_ * total) {
      ++above;
    }
    if (above > 1) list.erase(list.begin(), list.begin() + static_cast<std::ptrdiff_t>(above - 1));
  }

 private:
  double probability_, threshold_;
};

}  // namespace

std::unique_ptr<SamplerStage> make_xtc_stage(int, const SamplerOptions& o) {
  const double probability = o.number("xtc_probability", 0.0, 0.0, 1.0, "a number of 0 to 1");
  const double threshold = o.number("xtc_threshold", 0.1, 0.0, 1.0, "a number of 0 to 1");
  // No two tokens can both have more than half of the probability.
  if (probability == 0.0 || threshold > 0.5) return nullptr;
  return std::make_unique<Xtc>(probability, threshold);
}

}  // namespace stoker
