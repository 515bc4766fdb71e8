#include "runtime/core/decode.h"

#include <vector>

namespace stoker {

void decode(const Engine& engine, std::span<DecodeStep> steps, const std::function<void()>& poll) {
  std::vector<Row> rows;
  for (const DecodeStep& s : steps) {
    rows.push_back({s.sequence, s.token, s.sequence->position(), kWantKept});
  }
  engine.eval(rows, Phase::kDecode, {}, poll);
  const ThreadPool::Lease lease(engine.pool());
  const auto n = static_cast<int64_t>(steps.size());
  engine.pool().parallel_for(n, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      DecodeStep& s = steps[static_cast<size_t>(i)];
      try {
        s.next = s.sequence->sample(*s.sampler);
      } catch (...) {  // a pool's body does not throw
        s.next = -1;
      }
    }
  });
}

}  // namespace stoker
