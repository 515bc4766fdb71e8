#include "offload/units/expert_store.h"

namespace stoker {

namespace {

class ResidentLease : public ExpertLease {
 public:
  ResidentLease(const std::vector<Expert>& layer, std::span<const int32_t> experts)
      : layer_(layer), experts_(experts.begin(), experts.end()), ready_(experts.size()) {
    for (size_t i = 0; i < ready_.size(); ++i) ready_[i] = static_cast<int32_t>(i);
  }
  std::span<const int32_t> next_ready() override {
    if (given_) return {};
    given_ = true;
    return ready_;
  }
  const Expert& expert(int32_t index) const override {
    return layer_[static_cast<size_t>(experts_[static_cast<size_t>(index)])];
  }

 private:
  const std::vector<Expert>& layer_;
  std::vector<int32_t> experts_;
  std::vector<int32_t> ready_;
  bool given_ = false;
};

}  // namespace

std::unique_ptr<ExpertLease> ResidentExperts::acquire(int64_t layer,
                                                      std::span<const int32_t> experts,
                                                      const Routes&) {
  return std::make_unique<ResidentLease>(layers_[static_cast<size_t>(layer)], experts);
}

}  // namespace stoker
