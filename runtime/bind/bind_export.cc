// What the export tools need in C++ (export/native/experts.h, export/native/requantize.h).
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "export/native/experts.h"
#include "export/native/requantize.h"
#include "runtime/core/activation_sums.h"
#include "runtime/bind/bind.h"
#include "runtime/base/errors.h"
#include "runtime/core/sequence.h"
#include "runtime/bind/unlocked.h"

namespace nb = nanobind;
using stoker::Error;
using stoker::ErrorKind;
using stoker::Format;
using stoker::NeuronAxis;

namespace {

using FloatMatrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using IndexMatrix = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::c_contig, nb::device::cpu>;
using FloatVector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
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
    const stoker::Unlocked unlocked;
    stoker::make_experts(args);
  }
  return nb::cast(
      nb::ndarray<nb::numpy, uint8_t>(out, {order.shape(0), x.shape(0), row_bytes}, owner));
}

const Format& format_for(const char* what, const std::string& name, int64_t cols) {
  const Format* f = stoker::find_format(name.c_str());
  if (f == nullptr) refuse(std::string(what) + ": expected a tensor type, found " + name);
  if (cols % f->block != 0) {
    refuse(name + ": row length " + std::to_string(cols) + " is not a multiple of the block of " +
           std::to_string(f->block) + " weights");
  }
  return *f;
}

nb::object requantize(const std::string& source_format, const Bytes& data, int64_t rows,
                      int64_t cols, const std::string& format,
                      const std::optional<FloatVector>& importance, int threads,
                      int64_t first_row) {
  if (rows < 0 || cols < 1) {
    refuse("expected rows >= 0 and cols >= 1, found " + std::to_string(rows) + " and " +
           std::to_string(cols));
  }
  stoker::RequantizeArgs args;
  args.source = &format_for("source_format", source_format, cols);
  args.target = &format_for("format", format, cols);
  if (args.target->quantize == nullptr) {
    refuse("format: expected one that can be quantized to, found " + format);
  }
  const auto held = static_cast<int64_t>(data.size());
  const int64_t source_bytes = stoker::row_bytes(*args.source, cols);
  if (held % source_bytes != 0 || held / source_bytes != rows) {
    refuse(source_format + ": expected " + std::to_string(rows) + " rows of " +
           std::to_string(source_bytes) + " bytes, found " + std::to_string(held) + " bytes");
  }
  if (importance) {
    if (static_cast<int64_t>(importance->size()) != cols) {
      refuse("importance: expected [" + std::to_string(cols) + "], found [" +
             std::to_string(importance->size()) + "]");
    }
    for (size_t i = 0; i < importance->size(); ++i) {
      const float v = importance->data()[i];
      if (!(v >= 0) || !std::isfinite(v)) {
        refuse("importance: expected finite values >= 0, found " + std::to_string(v) +
               " at index " + std::to_string(i));
      }
    }
    args.importance = importance->data();
  }
  args.data = data.data();
  args.rows = rows;
  args.cols = cols;
  args.threads = threads;
  args.first_row = first_row;
  const size_t n = static_cast<size_t>(rows) * stoker::row_bytes(*args.target, cols);
  auto* out = new uint8_t[n > 0 ? n : 1];
  nb::capsule owner(out, [](void* p) noexcept { delete[] static_cast<uint8_t*>(p); });
  args.out = out;
  {
    const stoker::Unlocked unlocked;
    stoker::requantize(args);
  }
  return nb::cast(nb::ndarray<nb::numpy, uint8_t>(
      out, {static_cast<size_t>(rows), n / std::max<size_t>(1, static_cast<size_t>(rows))}, owner));
}

template <class T>
nb::object copied(const std::vector<T>& values, std::initializer_list<size_t> shape) {
  auto* out = new T[values.size() > 0 ? values.size() : 1];
  std::copy(values.begin(), values.end(), out);
  nb::capsule owner(out, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, T>(out, shape, owner));
}

nb::object eval_sums(stoker::ActivationSums& sums, stoker::Sequence& sequence,
                     const nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig>& tokens) {
  const std::span<const int32_t> ids(tokens.data(), tokens.size());
  std::vector<double> nll(tokens.size() > 0 ? tokens.size() - 1 : 0);
  {
    const stoker::Unlocked unlocked;
    sequence.eval_nll(ids, nll.data(), &sums);
  }
  return copied(nll, {nll.size()});
}

nb::dict sums_by_tensor(const stoker::ActivationSums& sums) {
  nb::dict d;
  for (const stoker::ActivationSums::Tensor& t : sums.tensors()) {
    d[t.name.c_str()] =
        nb::make_tuple(copied(t.squares, {t.counts.size(), static_cast<size_t>(t.cols)}),
                       copied(t.counts, {t.counts.size()}));
  }
  return d;
}

}  // namespace

void bind_export(nb::module_& m) {
  m.def("make_experts", &make_experts, nb::arg("format"), nb::arg("x"), nb::kw_only(),
        nb::arg("axis"), nb::arg("order"), nb::arg("seeds"), nb::arg("noise"),
        nb::arg("threads") = 1,
        "x f32 [rows, cols] -> uint8 [experts, rows, bytes of a row]: x with its rows or columns "
        "in each order [experts, rows or cols] i32, noise of seeds [experts] u64, quantized.");
  m.def("requantize", &requantize, nb::arg("source_format"), nb::arg("data"), nb::arg("rows"),
        nb::arg("cols"), nb::arg("format"), nb::arg("importance").none() = nb::none(),
        nb::arg("threads") = 1, nb::kw_only(), nb::arg("first_row") = 0,
        "uint8 rows of one tensor type -> uint8 [rows, bytes of a row] of another; importance f32 "
        "[cols] weighs the squared error. ModelFileError where a weight is not finite.");
  nb::class_<stoker::ActivationSums>(m, "ActivationSums")
      .def(nb::init<std::shared_ptr<const stoker::Engine>>(), nb::arg("engine"))
      .def("eval", eval_sums, nb::arg("sequence"), nb::arg("tokens"))
      .def_prop_ro("tensors", sums_by_tensor);
}
