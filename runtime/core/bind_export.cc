// What the export tools need in C++ (export/experts.h).
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "export/experts.h"
#include "runtime/core/bind.h"
#include "runtime/core/errors.h"

namespace nb = nanobind;
using stoker::Error;
using stoker::ErrorKind;
using stoker::Format;
using stoker::NeuronAxis;

namespace {

using FloatMatrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using IndexMatrix = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Seeds = nb::ndarray<const uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorKind::kOption, message); }

// Every row of `order` must be a permutation of 0 .. n - 1.
void check_permutations(const IndexMatrix& order) {
  const auto n = static_cast<int64_t>(order.shape(1));
  std::vector<size_t> seen(order.shape(1), 0);
  for (size_t e = 0; e < order.shape(0); ++e) {
    for (int64_t i = 0; i < n; ++i) {
      const int32_t at = order.data()[static_cast<int64_t>(e) * n + i];
      if (at < 0 || at >= n || seen[static_cast<size_t>(at)] == e + 1) {
        refuse("order: expected permutations of 0 to " + std::to_string(n - 1) + ", found " +
               std::to_string(at) + " in row " + std::to_string(e));
      }
      seen[static_cast<size_t>(at)] = e + 1;
    }
  }
}

nb::object make_experts(const std::string& format, const FloatMatrix& x, const std::string& axis,
                        const IndexMatrix& order, const Seeds& seeds, float noise, int threads) {
  const Format* f = stoker::find_format(format.c_str());
  if (f == nullptr || f->quantize == nullptr) {
    refuse("format: expected one that can be quantized to, found " + format);
  }
  if (axis != "rows" && axis != "columns") {
    refuse("axis: expected rows or columns, found " + axis);
  }
  stoker::ExpertsArgs args;
  args.format = f;
  args.x = x.data();
  args.rows = static_cast<int64_t>(x.shape(0));
  args.cols = static_cast<int64_t>(x.shape(1));
  args.axis = axis == "rows" ? NeuronAxis::kRows : NeuronAxis::kColumns;
  args.experts = static_cast<int64_t>(order.shape(0));
  args.order = order.data();
  args.seed = seeds.data();
  args.noise = noise;
  args.threads = threads;
  const int64_t neurons = axis == "rows" ? args.rows : args.cols;
  if (args.cols % f->block != 0) {
    refuse(format + ": row length " + std::to_string(args.cols) +
           " is not a multiple of the block of " + std::to_string(f->block) + " weights");
  }
  if (static_cast<int64_t>(order.shape(1)) != neurons || seeds.shape(0) != order.shape(0)) {
    refuse("order and seeds: expected [experts, " + std::to_string(neurons) + "] and [experts]");
  }
  // Larger noise would turn weights around.
  if (!(noise >= 0 && noise <= 0.5f)) {
    refuse("noise: expected 0 to 0.5, found " + std::to_string(noise));
  }
  check_permutations(order);
  for (size_t i = 0; i < x.size(); ++i) {
    if (!std::isfinite(x.data()[i])) {
      refuse("x must be finite: found " + std::to_string(x.data()[i]) + " at index " +
             std::to_string(i));
    }
  }
  const size_t row_bytes = static_cast<size_t>(stoker::row_bytes(*f, args.cols));
  const size_t n = order.shape(0) * x.shape(0) * row_bytes;
  auto* out = new uint8_t[n > 0 ? n : 1];
  nb::capsule owner(out, [](void* p) noexcept { delete[] static_cast<uint8_t*>(p); });
  args.out = out;
  {
    nb::gil_scoped_release release;
    stoker::make_experts(args);
  }
  return nb::cast(
      nb::ndarray<nb::numpy, uint8_t>(out, {order.shape(0), x.shape(0), row_bytes}, owner));
}

}  // namespace

void bind_export(nb::module_& m) {
  m.def("make_experts", &make_experts, nb::arg("format"), nb::arg("x"), nb::kw_only(),
        nb::arg("axis"), nb::arg("order"), nb::arg("seeds"), nb::arg("noise"),
        nb::arg("threads") = 1,
        "x f32 [rows, cols] -> uint8 [experts, rows, bytes of a row]: x with its rows or columns "
        "in each order [experts, rows or cols] i32, noise of seeds [experts] u64, quantized.");
}
