#include "offload/predict/predictor.h"

#include "runtime/base/errors.h"

namespace stoker {

#define STOKER_PREDICTOR(name, summary) \
  std::unique_ptr<Predictor> make_##name##_predictor(const PredictorShape& shape);
#include "offload/predict/predictors.inc"
#undef STOKER_PREDICTOR

std::unique_ptr<Predictor> make_predictor(std::string_view name, const PredictorShape& shape) {
  std::string known;
#define STOKER_PREDICTOR(which, summary)                      \
  if (name == #which) return make_##which##_predictor(shape); \
  known += std::string(known.empty() ? "" : ", ") + #which;
#include "offload/predict/predictors.inc"
#undef STOKER_PREDICTOR
  throw Error(ErrorKind::kOption,
              "predictor: expected one of " + known + ", found " + std::string(name));
}

std::vector<std::string_view> predictor_names() {
  return {
#define STOKER_PREDICTOR(name, summary) #name,
#include "offload/predict/predictors.inc"
#undef STOKER_PREDICTOR
  };
}

void Predictor::set_state(std::string_view bytes) {
  if (!bytes.empty()) {
    throw Error(ErrorKind::kOption, "this predictor learns nothing that could be loaded");
  }
}

}  // namespace stoker
