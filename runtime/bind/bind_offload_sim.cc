// The trace simulator in Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "offload/policy/policy.h"
#include "offload/trace/simulate.h"
#include "runtime/bind/bind.h"
#include "runtime/bind/unlocked.h"

namespace nb = nanobind;

namespace {

template <class T>
using Array = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <class T>
std::span<const T> span(const Array<T>& array) {
  return {array.data(), array.shape(0)};
}

nb::dict simulate(const Array<int64_t>& evaluation, const Array<int32_t>& layer,
                  const Array<int64_t>& offset, const Array<int32_t>& expert,
                  const Array<float>& weight, const Array<int32_t>& token,
                  const Array<uint8_t>& decode, const Array<int64_t>& sequence, int64_t n_layer,
                  int64_t n_expert, int64_t n_expert_used, const std::string& policy, int64_t slots,
                  int64_t count_from, const std::string& predictor) {
  const stoker::RoutingTrace trace{
      .shape = {.n_layer = n_layer, .n_expert = n_expert, .n_expert_used = n_expert_used},
      .evaluation = span(evaluation),
      .layer = span(layer),
      .offset = span(offset),
      .expert = span(expert),
      .weight = span(weight),
      .token = span(token),
      .decode = span(decode),
      .sequence = span(sequence)};
  stoker::Replay replay;
  {
    const stoker::Unlocked unlocked;
    replay = stoker::replay(trace, policy, slots, count_from, predictor);
  }
  nb::dict result;
  result["uses"] = replay.uses;
  result["misses"] = replay.misses;
  result["decode_misses"] = replay.decode_misses;
  result["foreseen"] = replay.foreseen;
  result["needless"] = replay.needless;
  result["layer_uses"] = replay.layer_uses;
  result["layer_misses"] = replay.layer_misses;
  return result;
}

using Names = std::vector<std::pair<std::string, std::string>>;

Names policies() {
  return {
#define STOKER_POLICY(name, summary) {#name, summary},
#include "offload/policy/policies.inc"
#undef STOKER_POLICY
  };
}

Names predictors() {
  return {
#define STOKER_PREDICTOR(name, summary) {#name, summary},
#include "offload/predict/predictors.inc"
#undef STOKER_PREDICTOR
  };
}

Names io_backends() {
  return {
#define STOKER_IO_BACKEND(name, summary) {#name, summary},
#include "offload/io/io_backends.inc"
#undef STOKER_IO_BACKEND
  };
}

}  // namespace

void bind_offload_sim(nb::module_& m) {
  m.def("simulate", &simulate, nb::kw_only(), nb::arg("evaluation"), nb::arg("layer"),
        nb::arg("offset"), nb::arg("expert"), nb::arg("weight"), nb::arg("token"),
        nb::arg("decode"), nb::arg("sequence"), nb::arg("n_layer"), nb::arg("n_expert"),
        nb::arg("n_expert_used"), nb::arg("policy"), nb::arg("slots"), nb::arg("count_from") = 0,
        nb::arg("predictor") = "",
        "Replays routing through a cold cache; see offload/trace/simulate.h.");
  m.attr("replayed_predictors") =
      std::vector<std::string>(std::begin(stoker::kReplayed), std::end(stoker::kReplayed));
  m.def("policies", &policies, "(name, summary) of every online cache policy.");
  m.def("predictors", &predictors, "(name, summary) of every predictor.");
  m.def("io_backends", &io_backends, "(name, summary) of every I/O backend.");
}
