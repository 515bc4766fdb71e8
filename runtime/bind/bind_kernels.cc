// The kernel table in Python: formats, instruction sets, and one call each of quantize, dequantize
// and matmul. For tests, benches and the export tools; the engine never comes through here.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kernels_cpu/isa/cpu.h"
#include "kernels_cpu/kernel.h"
#include "mobile_bench/native/kernel_speed.h"
#include "mobile_bench/native/peak.h"
#include "runtime/bind/bind.h"
#include "runtime/base/errors.h"
#include "runtime/base/start_threads.h"
#include "runtime/bind/unlocked.h"

namespace nb = nanobind;
using stoker::Error;
using stoker::ErrorKind;
using stoker::Format;
using stoker::Isa;

namespace {

using FloatArray = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using ByteArray = nb::ndarray<const uint8_t, nb::c_contig, nb::device::cpu>;

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorKind::kOption, message); }

const Format& format_of(const std::string& name) {
  if (const Format* format = stoker::find_format(name.c_str())) return *format;
  std::string names;
  int count;
  const Format* const* formats = stoker::all_formats(&count);
  for (int i = 0; i < count; ++i) names += std::string(i ? ", " : "") + formats[i]->name;
  refuse("unknown format '" + name + "': expected one of " + names);
}

// Returns whether some format has a kernel for the instruction set in this build.
bool compiled(Isa isa) {
  int count;
  const Format* const* formats = stoker::all_formats(&count);
  for (int i = 0; i < count; ++i) {
    if (formats[i]->matmul[static_cast<int>(isa)] != nullptr) return true;
  }
  return false;
}

Isa isa_of(const std::string& name) {
  std::string names;
  for (int i = 0; i < stoker::kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!stoker::isa_usable(isa)) continue;
    if (name == stoker::isa_name(isa)) return isa;
    names += std::string(names.empty() ? "" : ", ") + stoker::isa_name(isa);
  }
  refuse("instruction set '" + name + "' is not usable here: expected one of " + names);
}

void check_blocks(const Format& f, int64_t n, const char* what) {
  if (n % f.block != 0) {
    refuse(std::string(f.name) + ": " + what + " " + std::to_string(n) +
           " is not a multiple of the block of " + std::to_string(f.block) + " weights");
  }
}

void check_finite(const float* x, size_t n, const std::string& name) {
  for (size_t i = 0; i < n; ++i) {
    if (!std::isfinite(x[i])) {
      refuse(name + " must be finite: found " + std::to_string(x[i]) + " at index " +
             std::to_string(i));
    }
  }
}

// Returns 64-byte aligned memory of n values, freed with the array that takes it.
template <class T>
struct Buffer {
  explicit Buffer(size_t n)
      : data(new (std::align_val_t{64}) T[n > 0 ? n : 1],
             [](T* p) { ::operator delete[](p, std::align_val_t{64}); }) {}
  T* get() const { return data.get(); }
  std::unique_ptr<T[], void (*)(T*)> data;
};

template <class T>
nb::ndarray<nb::numpy, T> to_numpy(Buffer<T> buffer, const std::vector<size_t>& shape) {
  T* p = buffer.data.release();
  nb::capsule owner(
      p, [](void* q) noexcept { ::operator delete[](static_cast<T*>(q), std::align_val_t{64}); });
  return nb::ndarray<nb::numpy, T>(p, shape.size(), shape.data(), owner);
}

nb::list formats() {
  nb::list rows;
  int count;
  const Format* const* all = stoker::all_formats(&count);
  for (int i = 0; i < count; ++i) {
    nb::dict row;
    row["name"] = all[i]->name;
    row["id"] = static_cast<uint32_t>(all[i]->id);
    row["block"] = all[i]->block;
    row["bytes"] = all[i]->block_bytes;
    row["quantizes"] = all[i]->quantize != nullptr;
    rows.append(row);
  }
  return rows;
}

nb::list isas() {
  nb::list rows;
  for (int i = 0; i < stoker::kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (compiled(isa)) rows.append(nb::make_tuple(stoker::isa_name(isa), stoker::isa_usable(isa)));
  }
  return rows;
}

nb::dict describe_cpu() {
  const stoker::Cpu& c = stoker::cpu();
  nb::dict d;
  d["model"] = c.name;
  d["logical"] = c.logical;
  d["physical"] = c.physical;
  d["performance"] = c.performance;
  d["quota"] = c.quota;
  nb::list features;
  for (int i = 0; i < stoker::kIsaCount; ++i) {
    if (c.executes[i]) features.append(stoker::isa_name(static_cast<Isa>(i)));
  }
  d["features"] = features;
  return d;
}

nb::ndarray<nb::numpy, uint8_t> quantize(const std::string& format, const FloatArray& x,
                                         const std::optional<FloatArray>& importance, int threads) {
  const Format& f = format_of(format);
  if (f.quantize == nullptr) refuse(std::string(f.name) + " cannot be quantized to, only read");
  if (x.ndim() == 0) refuse("quantize: x must have at least one dimension");
  check_blocks(f, static_cast<int64_t>(x.shape(x.ndim() - 1)), "row length");
  std::vector<size_t> shape(x.ndim());
  for (size_t i = 0; i < x.ndim(); ++i) shape[i] = x.shape(i);
  shape.back() = static_cast<size_t>(stoker::row_bytes(f, static_cast<int64_t>(shape.back())));
  if (f.act == stoker::ActKind::i8) check_finite(x.data(), x.size(), "x");
  if (importance) {
    bool same = importance->ndim() == x.ndim();
    for (size_t i = 0; same && i < x.ndim(); ++i) same = importance->shape(i) == x.shape(i);
    if (!same) refuse("quantize: importance must have the shape of x");
    check_finite(importance->data(), importance->size(), "importance");
    for (size_t i = 0; i < importance->size(); ++i) {
      if (importance->data()[i] < 0) {
        refuse("importance must not be negative: found " + std::to_string(importance->data()[i]) +
               " at index " + std::to_string(i));
      }
    }
  }
  Buffer<uint8_t> out(x.size() / f.block * f.block_bytes);
  {
    const stoker::Unlocked unlocked;
    // Blocks know nothing of each other: any cut between them gives the same bytes.
    const int64_t blocks = static_cast<int64_t>(x.size()) / f.block;
    const int64_t parts = std::clamp<int64_t>(threads, 1, std::max<int64_t>(1, blocks));
    std::atomic<int64_t> next{0};
    const auto work = [&](int) {
      for (int64_t i = next.fetch_add(1); i < parts; i = next.fetch_add(1)) {
        const int64_t begin = blocks * i / parts, end = blocks * (i + 1) / parts;
        f.quantize(x.data() + begin * f.block, out.get() + begin * f.block_bytes,
                   (end - begin) * f.block,
                   importance ? importance->data() + begin * f.block : nullptr);
      }
    };
    std::vector<std::thread> others = stoker::start_threads(static_cast<int>(parts) - 1, work);
    work(0);
    stoker::join(others);
  }
  return to_numpy(std::move(out), shape);
}

nb::ndarray<nb::numpy, float> dequantize(const std::string& format, const ByteArray& data,
                                         int64_t n) {
  const Format& f = format_of(format);
  if (n < 0) refuse("dequantize: n must not be negative: found " + std::to_string(n));
  check_blocks(f, n, "n");
  const int64_t bytes = stoker::row_bytes(f, n);
  if (static_cast<int64_t>(data.size()) != bytes) {
    refuse(std::string(f.name) + ": expected " + std::to_string(bytes) + " bytes for " +
           std::to_string(n) + " weights, found " + std::to_string(data.size()));
  }
  Buffer<float> out(static_cast<size_t>(n));
  {
    const stoker::Unlocked unlocked;
    f.dequantize(data.data(), out.get(), n);
  }
  return to_numpy(std::move(out), {static_cast<size_t>(n)});
}

nb::ndarray<nb::numpy, float> matmul(const std::string& format, const std::string& isa_name,
                                     const ByteArray& w, int64_t rows, const FloatArray& x) {
  const Format& f = format_of(format);
  const Isa isa = isa_of(isa_name);
  if (x.ndim() != 2) {
    refuse("matmul: x must be [tokens, cols], found " + std::to_string(x.ndim()) + " dimensions");
  }
  const int64_t tokens = static_cast<int64_t>(x.shape(0));
  const int64_t cols = static_cast<int64_t>(x.shape(1));
  check_blocks(f, cols, "row length");
  if (cols == 0) refuse("matmul: x has no columns");
  if (rows < 0) refuse("matmul: rows must not be negative: found " + std::to_string(rows));
  const int64_t row_bytes = stoker::row_bytes(f, cols);
  const int64_t held = static_cast<int64_t>(w.size());
  if (held / row_bytes != rows || held % row_bytes != 0) {
    refuse(std::string(f.name) + ": expected " + std::to_string(rows) + " rows of " +
           std::to_string(row_bytes) + " bytes, found " + std::to_string(held) + " bytes");
  }
  Buffer<float> y(static_cast<size_t>(tokens * rows));
  {
    const stoker::Unlocked unlocked;
    Buffer<uint8_t> scratch(stoker::matmul_scratch_bytes(cols));
    const int64_t stride = (cols + 63) / 64 * 64;
    const bool integer = f.act == stoker::ActKind::i8;
    Buffer<int8_t> q(static_cast<size_t>(integer ? tokens * stride : 0));
    Buffer<float> scale(static_cast<size_t>(integer ? tokens * (cols / 32) : 0));
    Buffer<int32_t> sum16(static_cast<size_t>(integer ? tokens * (cols / 16) : 0));
    stoker::MatmulArgs args;
    args.w = w.data();
    args.row_bytes = row_bytes;
    args.row_end = rows;
    args.x.kind = f.act;
    args.x.tokens = tokens;
    args.x.cols = cols;
    if (integer) {
      const stoker::QuantizeActFn quantize_act = stoker::quantize_act_kernel(isa);
      for (int64_t t = 0; t < tokens; ++t) {
        quantize_act(x.data() + t * cols, cols, q.get() + t * stride, scale.get() + t * (cols / 32),
                     sum16.get() + t * (cols / 16));
      }
      args.x.q = q.get();
      args.x.q_stride = stride;
      args.x.scale = scale.get();
      args.x.sum16 = sum16.get();
    } else {
      args.x.x = x.data();
      args.x.x_stride = cols;
    }
    args.n_tokens = tokens;
    args.y = y.get();
    args.y_stride = rows;
    args.scratch = scratch.get();
    stoker::matmul_kernel(f, isa)(args);
  }
  return to_numpy(std::move(y), {static_cast<size_t>(tokens), static_cast<size_t>(rows)});
}

}  // namespace

void bind_kernels(nb::module_& m) {
  m.def("formats", &formats, "Every weight format: name, GGUF id, block, bytes, quantizes.");
  m.def("isas", &isas, "Every compiled instruction set and whether it executes here.");
  m.def(
      "active_isa", [] { return std::string(stoker::isa_name(stoker::active_isa())); },
      "The instruction set in use: the best one, or what STOKER_ISA names.");
  m.def("cpu", &describe_cpu, "The processor: model, cores, quota, usable instruction sets.");
  m.def("quantize", &quantize, nb::arg("format"), nb::arg("x"), nb::kw_only(),
        nb::arg("importance") = nb::none(), nb::arg("threads") = 1,
        "x f32 [..., cols] -> uint8 [..., bytes of a row]; importance weighs the squared error.");
  m.def("dequantize", &dequantize, nb::arg("format"), nb::arg("data"), nb::arg("n"),
        "data: the bytes of n weights -> f32 [n].");
  m.def("matmul", &matmul, nb::arg("format"), nb::arg("isa"), nb::arg("w"), nb::arg("rows"),
        nb::arg("x"),
        "y[t, r] = W[r] . x[t]: w uint8, rows * row bytes; x f32 [tokens, cols]; y f32.");
  m.def(
      "read_bandwidth",
      [](int threads, int64_t bytes) {
        const stoker::Unlocked unlocked;
        return stoker::read_bandwidth(threads, bytes);
      },
      nb::arg("threads"), nb::arg("bytes"),
      "Bytes a second that the threads read together from a buffer of `bytes` bytes.");
  m.def(
      "int8_peak",
      [](const std::string& isa, int threads) {
        const stoker::Isa which = isa_of(isa);
        const stoker::Unlocked unlocked;
        return stoker::int8_peak(which, threads);
      },
      nb::arg("isa"), nb::arg("threads"),
      "int8 operations a second of the ISA's best instruction, operands in registers.");
  m.def(
      "float32_peak",
      [](const std::string& isa, int threads) {
        const stoker::Isa which = isa_of(isa);
        const stoker::Unlocked unlocked;
        return stoker::float32_peak(which, threads);
      },
      nb::arg("isa"), nb::arg("threads"), "The same of float32 multiply-adds.");
  m.def(
      "kernel_speed",
      [](const std::string& format, const std::string& isa, int64_t rows, int64_t cols,
         int64_t tokens, int threads, double seconds, bool quantize) {
        const Format& f = format_of(format);
        const stoker::Isa which = isa_of(isa);
        const stoker::Unlocked unlocked;
        return stoker::kernel_speed(f, which, rows, cols, tokens, threads, seconds, quantize);
      },
      nb::arg("format"), nb::arg("isa"), nb::arg("rows"), nb::arg("cols"), nb::arg("tokens"),
      nb::arg("threads") = 1, nb::arg("seconds") = 0.25, nb::arg("quantize") = false,
      "Seconds of the fastest product of a [rows, cols] matrix with `tokens` tokens.");
}
