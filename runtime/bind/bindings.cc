// The Python module stoker.runtime._core: each bind_*.cc adds its part.
#include <nanobind/nanobind.h>

#include <exception>
#include <string_view>

#include "runtime/bind/bind.h"
#include "runtime/base/errors.h"

namespace nb = nanobind;

namespace {

const char* class_name(stoker::ErrorKind kind) {
  switch (kind) {
    case stoker::ErrorKind::kModelFile:
      return "ModelFileError";
    case stoker::ErrorKind::kUnsupported:
      return "UnsupportedModelError";
    case stoker::ErrorKind::kContext:
      return "ContextLengthError";
    case stoker::ErrorKind::kBudget:
      return "BudgetError";
    case stoker::ErrorKind::kOption:
      return "OptionError";
    case stoker::ErrorKind::kInterrupted:
      return "Cancelled";
    case stoker::ErrorKind::kDevice:
      return "DeviceError";
  }
  return "StokerError";
}

void translate(const std::exception_ptr& p, void*) {
  try {
    std::rethrow_exception(p);
  } catch (const stoker::Error& e) {
    nb::object type = nb::module_::import_("stoker.runtime.base.errors").attr(class_name(e.kind()));
    // A path or a name in it need not be UTF-8.
    const std::string_view text = e.what();
    nb::object message = nb::steal(PyUnicode_DecodeUTF8(
        text.data(), static_cast<Py_ssize_t>(text.size()), "backslashreplace"));
    PyErr_SetObject(type.ptr(), message.ptr());
  }
}

}  // namespace

NB_MODULE(_core, m) {
  nb::register_exception_translator(translate);
  bind_gguf(m);
  bind_kernels(m);
  bind_sampler(m);
  bind_engine(m);
  bind_export(m);
  bind_offload_sim(m);
  bind_predict(m);
  bind_probe(m);
  bind_unlocked(m);
}
