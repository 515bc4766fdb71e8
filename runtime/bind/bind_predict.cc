// Predictors in Python: what they would find in a recording.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <string>
#include <vector>

#include "offload/predict/replay.h"
#include "runtime/bind/bind.h"
#include "runtime/base/errors.h"
#include "runtime/bind/unlocked.h"

namespace nb = nanobind;
using stoker::Error;
using stoker::ErrorKind;

namespace {

template <class T>
using Cube = nb::ndarray<const T, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

[[noreturn]] void refuse(const std::string& message) {
  throw Error(ErrorKind::kOption, "replay: " + message);
}

nb::dict replay(const std::string& predictor, nb::bytes state, const Cube<float>& hidden,
                const Cube<int32_t>& experts, const Cube<float>& routers, int64_t distance,
                int64_t width, int64_t count_from) {
  stoker::PredictorShape shape;
  shape.n_layer = static_cast<int64_t>(routers.shape(0));
  shape.n_expert = static_cast<int64_t>(routers.shape(1));
  shape.n_embd = static_cast<int64_t>(routers.shape(2));
  shape.n_expert_used = static_cast<int64_t>(experts.shape(2));
  stoker::Recording recording{static_cast<int64_t>(experts.shape(0)), hidden.data(), experts.data(),
                              routers.data()};
  const auto layers = static_cast<size_t>(shape.n_layer);
  if (experts.shape(1) != layers || hidden.shape(0) != layers + 1 ||
      hidden.shape(1) != experts.shape(0) || hidden.shape(2) != routers.shape(2)) {
    refuse(
        "expected hidden [layers + 1][tokens][n_embd], experts [tokens][layers][used] and "
        "routers [layers][experts][n_embd], found arrays that disagree");
  }
  if (shape.n_expert_used < 1 || shape.n_expert_used > shape.n_expert) {
    refuse("expected 1 to " + std::to_string(shape.n_expert) + " experts used, found " +
           std::to_string(shape.n_expert_used));
  }
  if (distance < 1 || width < 1) refuse("expected a distance and a width of at least 1");
  // A layer without experts has -1 in their place.
  const size_t used = experts.shape(2);
  for (size_t l = 0; l < layers; ++l) {
    shape.mixture.push_back(experts.shape(0) == 0 || experts.data()[l * used] >= 0);
  }
  for (size_t i = 0; i < experts.size(); ++i) {
    const int32_t e = experts.data()[i];
    if (e >= shape.n_expert || (e < 0) == shape.mixture[i / used % layers]) {
      refuse("expected experts below " + std::to_string(shape.n_expert) + ", found " +
             std::to_string(e));
    }
  }
  const auto made = stoker::make_predictor(predictor, shape);
  if (!made) refuse("expected a predictor that guesses, found " + predictor);
  made->set_state({state.c_str(), state.size()});
  stoker::Recall recall;
  {
    const stoker::Unlocked unlocked;
    recall = stoker::replay(*made, shape, recording, distance, width, count_from);
  }
  const std::string learnt = made->state();
  nb::dict d;
  d["found"] = nb::cast(recall.found);
  d["asked"] = nb::cast(recall.asked);
  d["state"] = nb::bytes(learnt.data(), learnt.size());
  return d;
}

}  // namespace

void bind_predict(nb::module_& m) {
  m.def("replay_predictor", replay, nb::arg("predictor"), nb::kw_only(), nb::arg("state"),
        nb::arg("hidden"), nb::arg("experts"), nb::arg("routers"), nb::arg("distance"),
        nb::arg("width"), nb::arg("count_from") = 0);
}
