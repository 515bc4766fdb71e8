// The sampler in Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <string>

#include "runtime/base/errors.h"
#include "runtime/bind/bind.h"
#include "runtime/sampling/sampler.h"

namespace nb = nanobind;
using stoker::Error;
using stoker::ErrorKind;
using stoker::Sampler;
using stoker::SamplerOptions;

namespace {

using Logits = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Mask = nb::ndarray<const uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

const float* checked(const Sampler& sampler, const Logits& logits) {
  if (logits.shape(0) != static_cast<size_t>(sampler.n_vocab())) {
    throw Error(ErrorKind::kOption, "logits: expected " + std::to_string(sampler.n_vocab()) +
                                        " of them, found " + std::to_string(logits.shape(0)));
  }
  return logits.data();
}

// Numbers and lists of tokens by name, for the stages to read.
SamplerOptions options_of(const nb::kwargs& given) {
  SamplerOptions options;
  for (const auto [key, value] : given) {
    const auto name = nb::cast<std::string>(key);
    if (name == "seed") {
      options.seed = nb::cast<uint64_t>(value);
    } else if (name == "logprobs") {
      options.logprobs = nb::cast<int>(value);
    } else if (name == "logit_bias") {
      if (value.is_none()) continue;
      for (const auto [token, bias] : nb::cast<nb::dict>(value)) {
        options.logit_bias.emplace_back(nb::cast<int32_t>(token), nb::cast<double>(bias));
      }
    } else if (nb::isinstance<nb::sequence>(value)) {
      options.tokens[name] = nb::cast<std::vector<int32_t>>(value);
    } else {
      options.numbers[name] = nb::cast<double>(value);
    }
  }
  return options;
}

}  // namespace

void bind_sampler(nb::module_& m) {
  nb::class_<Sampler>(m, "Sampler", "Sampling stages and their state (sampling/stages.inc).")
      .def(
          "__init__",
          [](Sampler* self, int n_vocab, const nb::kwargs& given) {
            try {
              new (self) Sampler(n_vocab, options_of(given));
            } catch (const std::bad_cast&) {
              throw nb::type_error("Sampler: expected numbers and lists of tokens");
            }
          },
          nb::arg("n_vocab"), nb::arg("options"))
      .def(
          "sample", [](Sampler& s, const Logits& logits) { return s.sample(checked(s, logits)); },
          nb::arg("logits"), "Chooses a token from logits [n_vocab] and commits it.")
      .def(
          "peek", [](Sampler& s, const Logits& logits) { return s.peek(checked(s, logits)); },
          nb::arg("logits"), "The token that sample() would choose; the sampler stays as it is.")
      .def("commit", &Sampler::commit, nb::arg("token"), "Takes the token that peek() gave.")
      .def("accept", &Sampler::accept, nb::arg("token"),
           "Counts a token that was not chosen here (of the prompt).")
      .def(
          "set_mask",
          [](Sampler& s, const nb::object& allowed) {
            if (allowed.is_none()) return s.set_mask({});
            const auto mask = nb::cast<Mask>(allowed);
            s.set_mask({mask.data(), mask.shape(0)});
          },
          nb::arg("allowed").none(),
          "The tokens that may be chosen, a bit each: uint32 [(n_vocab + 31) // 32]; None: all.")
      .def("reset", &Sampler::reset, "Back to the state after construction.")
      .def_prop_ro("history", &Sampler::history,
                   "Tokens before the first choice to accept(), the last ones; -1: all.")
      .def_prop_ro("n_vocab", &Sampler::n_vocab)
      .def_prop_ro("logprob", &Sampler::logprob,
                   "Of the last choice, from the unmodified logits, in nats; NaN where the option "
                   "logprobs is 0.")
      .def_prop_ro("top_logprobs", &Sampler::top_logprobs,
                   "(token, logprob) of the most probable tokens at the last choice, best first.");
}
