#include "runtime/core/bind.h"

void bind_sampler(nanobind::module_&) {}
