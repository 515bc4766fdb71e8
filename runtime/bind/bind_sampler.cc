// The sampler in Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <string>

#include "runtime/bind/bind.h"
#include "runtime/base/errors.h"
#include "runtime/sampling/sampler.h"

namespace nb = nanobind;
using stoker::Error;
using stoker::ErrorKind;
using stoker::Sampler;

namespace {

using Logits = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

int sample(Sampler& sampler, const Logits& logits) {
  if (logits.shape(0) != static_cast<size_t>(sampler.n_vocab())) {
    throw Error(ErrorKind::kOption, "logits: expected " + std::to_string(sampler.n_vocab()) +
                                        " of them, found " + std::to_string(logits.shape(0)));
  }
  return sampler.sample(logits.data());
}

}  // namespace

void bind_sampler(nb::module_& m) {
  nb::class_<Sampler>(m, "Sampler",
                      "Sampling chain and its state: logit bias, penalties, top-k, top-p, min-p, "
                      "temperature.")
      .def(
          "__init__",
          [](Sampler* self, int n_vocab, double temperature, int top_k, double top_p, double min_p,
             double repetition_penalty, double frequency_penalty, double presence_penalty,
             int penalty_window, const nb::object& logit_bias, uint64_t seed, int logprobs) {
            Sampler::Options options;
            options.temperature = temperature;
            options.top_k = top_k;
            options.top_p = top_p;
            options.min_p = min_p;
            options.repetition_penalty = repetition_penalty;
            options.frequency_penalty = frequency_penalty;
            options.presence_penalty = presence_penalty;
            options.penalty_window = penalty_window;
            options.seed = seed;
            options.logprobs = logprobs;
            if (!logit_bias.is_none()) {
              for (const auto [token, bias] : nb::cast<nb::dict>(logit_bias)) {
                options.logit_bias.emplace_back(nb::cast<int>(token), nb::cast<double>(bias));
              }
            }
            new (self) Sampler(n_vocab, options);
          },
          nb::arg("n_vocab"), nb::kw_only(), nb::arg("temperature") = 0.0, nb::arg("top_k") = 0,
          nb::arg("top_p") = 1.0, nb::arg("min_p") = 0.0, nb::arg("repetition_penalty") = 1.0,
          nb::arg("frequency_penalty") = 0.0, nb::arg("presence_penalty") = 0.0,
          nb::arg("penalty_window") = 64, nb::arg("logit_bias") = nb::none(), nb::arg("seed") = 0,
          nb::arg("logprobs") = 0)
      .def("sample", &sample, nb::arg("logits"),
           "Chooses a token from logits [n_vocab] and accepts it for the penalties.")
      .def("accept", &Sampler::accept, nb::arg("token"),
           "Counts a token that sample() did not choose (of the prompt) for the penalties.")
      .def("reset", &Sampler::reset, "Back to the state after construction.")
      .def_prop_ro("n_vocab", &Sampler::n_vocab)
      .def_prop_ro("logprob", &Sampler::logprob,
                   "Of the last choice, from the unmodified logits, in nats; NaN where the option "
                   "logprobs is 0.")
      .def_prop_ro("top_logprobs", &Sampler::top_logprobs,
                   "(token, logprob) of the most probable tokens at the last choice, best first.");
}
