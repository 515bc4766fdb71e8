#include "offload/policy/policy.h"

#include <string>

#include "runtime/base/errors.h"

namespace stoker {

#define STOKER_POLICY(name, summary) \
  std::unique_ptr<Policy> make_##name##_policy(const PolicyShape& shape);
#include "offload/policy/policies.inc"
#undef STOKER_POLICY

std::unique_ptr<Policy> make_policy(std::string_view name, const PolicyShape& shape) {
#define STOKER_POLICY(policy, summary) \
  if (name == #policy) return make_##policy##_policy(shape);
#include "offload/policy/policies.inc"
#undef STOKER_POLICY
  std::string known;
  for (const std::string_view other : policy_names()) {
    known.append(known.empty() ? "" : ", ").append(other);
  }
  throw Error(ErrorKind::kOption,
              "cache policy: expected one of " + known + ", found " + std::string(name));
}

std::vector<std::string_view> policy_names() {
  return {
#define STOKER_POLICY(policy, summary) #policy,
#include "offload/policy/policies.inc"
#undef STOKER_POLICY
  };
}

}  // namespace stoker
