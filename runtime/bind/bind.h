// The parts of the Python module, one bind_<part>.cc each.
#pragma once

#include <nanobind/nanobind.h>

#include <string_view>

// Bytes of a file as str: those that are no UTF-8 (byte tokens, foreign names) become surrogates
// and encode back.
nanobind::object decoded(std::string_view bytes);

void bind_gguf(nanobind::module_& m);
void bind_kernels(nanobind::module_& m);
void bind_sampler(nanobind::module_& m);
void bind_engine(nanobind::module_& m);
void bind_export(nanobind::module_& m);
void bind_offload_sim(nanobind::module_& m);
void bind_predict(nanobind::module_& m);
void bind_probe(nanobind::module_& m);
void bind_unlocked(nanobind::module_& m);
