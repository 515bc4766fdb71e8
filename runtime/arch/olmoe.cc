// OLMoE: a mixture in every layer; q and k are normalised over their whole width.
#include "runtime/arch/families.h"

namespace stoker {

namespace {

void configure(const GgufFile&, ModelConfig& c) {
  c.rope.neox = true;
  c.sliding_window = 0;
  c.qk_norm = c.qk_norm_full = true;
  c.normalize_experts = false;
  c.n_ff_expert = c.n_ff;
}

}  // namespace

extern const Family kFamily_olmoe = {configure, standard_layer};

}  // namespace stoker
