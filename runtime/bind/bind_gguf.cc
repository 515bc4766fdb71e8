// GGUF files in Python: metadata as plain objects, the tensor directory, the shards.
#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "runtime/bind/bind.h"
#include "runtime/base/errors.h"
#include "runtime/gguf/gguf.h"
#include "runtime/gguf/metadata_keys.h"
#include "runtime/gguf/strings.h"
#include "runtime/bind/unlocked.h"

namespace nb = nanobind;
using stoker::GgufFile;
using stoker::GgufTensor;
using stoker::GgufValue;
using stoker::Strings;

namespace {

// Takes ownership of a new reference; a null one means that Python has an error to raise.
nb::object checked(PyObject* fresh) {
  if (fresh == nullptr) throw nb::python_error();
  return nb::steal(fresh);
}

PyObject* decode(std::string_view text) {
  return PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "surrogateescape");
}

nb::bytes encode(const nb::str& text) {
  return nb::borrow<nb::bytes>(
      checked(PyUnicode_AsEncodedString(text.ptr(), "utf-8", "surrogateescape")));
}

nb::object decode_path(const std::string& path) {
  return checked(
      PyUnicode_DecodeFSDefaultAndSize(path.data(), static_cast<Py_ssize_t>(path.size())));
}

// Returns a list of n new references; `make(i)` makes one.
template <typename Make>
nb::object make_list(size_t n, const Make& make) {
  nb::object list = checked(PyList_New(static_cast<Py_ssize_t>(n)));
  for (size_t i = 0; i < n; ++i) {
    PyObject* item = make(i);
    if (item == nullptr) throw nb::python_error();
    PyList_SET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i), item);
  }
  return list;
}

nb::object to_python(const GgufValue& value);

nb::object array_to_python(const GgufValue& value) {
  using Type = GgufValue::Type;
  switch (value.element_type()) {
    case Type::string: {
      const auto items = value.as_string_array();
      return make_list(items.size(), [&](size_t i) { return decode(items[i]); });
    }
    case Type::f32:
    case Type::f64: {
      const auto items = value.as_double_array();
      return make_list(items.size(), [&](size_t i) { return PyFloat_FromDouble(items[i]); });
    }
    case Type::boolean: {
      const auto items = value.as_int_array();
      return make_list(items.size(), [&](size_t i) { return PyBool_FromLong(items[i] != 0); });
    }
    case Type::u64:
    case Type::array: {
      const auto items = value.as_array();
      return make_list(items.size(), [&](size_t i) { return to_python(items[i]).release().ptr(); });
    }
    default: {
      const auto items = value.as_int_array();
      return make_list(items.size(), [&](size_t i) { return PyLong_FromLongLong(items[i]); });
    }
  }
}

nb::object to_python(const GgufValue& value) {
  if (value.is_array()) return array_to_python(value);
  if (value.is_string()) return decoded(value.as_string());
  if (value.is_bool()) return nb::bool_(value.as_bool());
  if (value.is_float()) return nb::float_(value.as_float());
  if (value.type() == GgufValue::Type::u64) {
    return checked(PyLong_FromUnsignedLongLong(value.as_uint()));
  }
  return nb::int_(value.as_int());
}

std::shared_ptr<const GgufFile> open_file(const nb::object& path) {
  PyObject* encoded = nullptr;  // str, bytes or os.PathLike -> bytes
  if (PyUnicode_FSConverter(path.ptr(), &encoded) == 0) throw nb::python_error();
  const nb::bytes bytes = nb::steal<nb::bytes>(encoded);
  const std::string name(bytes.c_str(), bytes.size());
  const stoker::Unlocked unlocked;
  return GgufFile::open(name);
}

nb::tuple shape(const GgufTensor& t) {
  nb::object out = checked(PyTuple_New(t.n_dims));
  for (int d = 0; d < t.n_dims; ++d) {
    PyTuple_SET_ITEM(out.ptr(), d, nb::int_(t.ne[d]).release().ptr());
  }
  return nb::borrow<nb::tuple>(out);
}

// Returns the numbers of the texts of an array.
struct StringIds {
  std::shared_ptr<const Strings> strings;

  // -1: there is none.
  int64_t find(nb::handle text) const {
    Py_ssize_t size = 0;
    const char* plain = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
    if (plain) return strings->find({plain, static_cast<size_t>(size)});
    PyErr_Clear();  // no text, or text with bytes that are not UTF-8
    if (!PyUnicode_Check(text.ptr())) return -1;
    PyObject* bytes = PyUnicode_AsEncodedString(text.ptr(), "utf-8", "surrogateescape");
    if (!bytes) {  // half of a surrogate pair, which no file holds
      PyErr_Clear();
      return -1;
    }
    const nb::bytes owned = nb::steal<nb::bytes>(bytes);
    return strings->find({owned.c_str(), owned.size()});
  }
};

nb::list keys() {
  nb::list list;
  for (const stoker::MetadataKey& k : stoker::metadata_keys()) {
    list.append(nb::make_tuple(k.key, stoker::key_use_name(k.use), k.neutral));
  }
  return list;
}

nb::object key_use(const std::string& key, const std::string& architecture) {
  const stoker::MetadataKey* row = stoker::find_metadata_key(key, architecture);
  return row ? nb::object(nb::str(stoker::key_use_name(row->use))) : nb::none();
}

// Returns whether data, the first bytes of a shard of file_size bytes, hold all of its header.
bool header_is_whole(nb::bytes data, uint64_t file_size, const std::string& name) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(data.c_str());
  try {
    const stoker::Unlocked unlocked;
    GgufFile::parse(bytes, data.size(), file_size, name);
  } catch (const stoker::HeaderEndsEarly&) {
    return false;
  }
  return true;
}

}  // namespace

nb::object decoded(std::string_view bytes) { return checked(decode(bytes)); }

void bind_gguf(nb::module_& m) {
  nb::class_<StringIds>(m, "StringIds", "Text -> number in a Strings.")
      .def(
          "get",
          [](const StringIds& ids, nb::handle text, nb::object fallback) {
            const int64_t found = ids.find(text);
            return found < 0 ? fallback : nb::object(nb::int_(found));
          },
          nb::arg("text"), nb::arg("fallback").none() = nb::none())
      .def("__contains__",
           [](const StringIds& ids, nb::handle text) { return ids.find(text) >= 0; })
      .def("__getitem__", [](const StringIds& ids, nb::handle text) {
        const int64_t found = ids.find(text);
        if (found < 0) throw nb::key_error();
        return found;
      });
  nb::class_<Strings>(m, "Strings", "An array of strings in a file's metadata.")
      .def("__len__", &Strings::size)
      .def("__getitem__",
           [](const Strings& s, int64_t i) {
             if (i < 0) i += s.size();
             if (i < 0 || i >= s.size()) throw nb::index_error();
             return decoded(s.at(i));
           })
      .def_prop_ro("ids", [](std::shared_ptr<const Strings> s) { return StringIds{std::move(s)}; });

  nb::class_<GgufTensor>(m, "TensorInfo",
                         "One row of the tensor directory; shape[0] is the contiguous dimension.")
      .def_prop_ro("name", [](const GgufTensor& t) { return decoded(t.name); })
      .def_prop_ro("type",
                   [](const GgufTensor& t) { return stoker::gguf_tensor_type_name(t.type); })
      .def_prop_ro("shape", &shape)
      .def_ro("offset", &GgufTensor::offset, "Bytes from the start of its shard.")
      .def_ro("nbytes", &GgufTensor::nbytes, "Bytes of data; 0 where the type is unknown.")
      .def_ro("shard", &GgufTensor::shard, "Index into GgufFile.shards.")
      .def("__repr__", [](const GgufTensor& t) {
        return nb::str("TensorInfo({!r}, {}, {})")
            .format(decoded(t.name), stoker::gguf_tensor_type_name(t.type), shape(t));
      });

  nb::class_<GgufFile>(
      m, "GgufFile",
      "A GGUF file or the first of its shards: header and directory, checked against the files.")
      .def(nb::new_(&open_file), nb::arg("path"))
      .def_static("header_is_whole", &header_is_whole, nb::arg("data"), nb::arg("file_size"),
                  nb::arg("name"),
                  "Whether the first bytes of a shard hold its header and directory.")
      .def_prop_ro("path", [](const GgufFile& f) { return decode_path(f.path()); })
      .def_prop_ro("version", &GgufFile::version)
      .def_prop_ro("nbytes", &GgufFile::nbytes, "Bytes of all shards.")
      .def_prop_ro("shards",
                   [](const GgufFile& f) {
                     return make_list(f.shards().size(), [&](size_t i) {
                       return decode_path(f.shards()[i]).release().ptr();
                     });
                   })
      .def_prop_ro(
          "metadata",
          [](const GgufFile& f) {
            nb::dict out;
            for (const auto& [key, value] : f.metadata()) {
              out[decoded(key)] = to_python(value);
            }
            return out;
          },
          "All metadata in file order, converted anew each time; get() converts one value.")
      .def(
          "get",
          [](const GgufFile& f, const nb::str& key) {
            const nb::bytes bytes = encode(key);
            const GgufValue* value = f.find({bytes.c_str(), bytes.size()});
            return value == nullptr ? nb::none() : to_python(*value);
          },
          nb::arg("key"), "One metadata value, None where absent.")
      .def(
          "strings",
          [](std::shared_ptr<const GgufFile> f, const nb::str& key) {
            const nb::bytes bytes = encode(key);
            return Strings::of(std::move(f), {bytes.c_str(), bytes.size()});
          },
          nb::arg("key"), "An array of strings, without a copy of them; None where it is none.")
      .def_prop_ro("unknown_metadata",
                   [](const GgufFile& f) {
                     const auto names = stoker::unknown_metadata(f);
                     return make_list(names.size(), [&](size_t i) { return decode(names[i]); });
                   })
      .def_prop_ro("tensors", [](const GgufFile& f) {
        return make_list(f.tensors().size(),
                         [&](size_t i) { return nb::cast(f.tensors()[i]).release().ptr(); });
      });

  m.def("metadata_keys", keys, "(key, use, neutral values) of each metadata key that is known.");
  m.def("metadata_key_use", key_use, nb::arg("key"), nb::arg("architecture"),
        "What a key of a file is to the engine; None where it is unknown.");
}
