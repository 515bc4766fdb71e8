// The device in Python: control groups, measurements of storage.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <string>
#include <utility>

#include "mobile_bench/native/storage_file.h"
#include "runtime/bind/bind.h"
#include "runtime/base/control_groups.h"
#include "runtime/base/errors.h"
#include "runtime/bind/unlocked.h"

namespace nb = nanobind;
using stoker::ReadLoad;
using stoker::ReadMode;
using stoker::ReadSpeed;
using stoker::StorageFile;

namespace {

ReadMode mode_of(const std::string& name) {
  if (name == "direct") return ReadMode::kDirect;
  if (name == "buffered") return ReadMode::kBuffered;
  if (name == "mapped") return ReadMode::kMapped;
  throw stoker::Error(stoker::ErrorKind::kOption,
                      "storage mode: expected direct, buffered or mapped, found '" + name + "'");
}

nb::dict read_speed(StorageFile& file, const std::string& mode, uint64_t block, int depth,
                    double seconds, uint64_t seed, bool huge_pages) {
  const ReadLoad load{mode_of(mode), block, depth, seconds, seed, huge_pages};
  ReadSpeed speed;
  {
    const stoker::Unlocked unlocked;
    speed = file.read(load);
  }
  nb::dict d;
  d["reads"] = speed.reads;
  d["bytes"] = speed.bytes;
  d["seconds"] = speed.seconds;
  return d;
}

nb::list groups(const std::string& controller, const std::string& groups, const std::string& mounts,
                const std::string& root) {
  nb::list found;
  for (const stoker::ControlGroup& g : stoker::control_groups(controller, {groups, mounts, root})) {
    found.append(nb::make_tuple(g.version, g.path, g.folder));
  }
  return found;
}

int quota(const std::string& groups, const std::string& mounts, const std::string& root) {
  return stoker::cpu_quota({groups, mounts, root});
}

}  // namespace

void bind_probe(nb::module_& m) {
  const stoker::ControlGroupFiles files;
  m.def("control_groups", groups, nb::arg("controller"), nb::arg("groups") = files.groups,
        nb::arg("mounts") = files.mounts, nb::arg("root") = files.root,
        "(version, path, folder) of the process's group for a controller and of those above it.");
  m.def("cpu_quota", quota, nb::arg("groups") = files.groups, nb::arg("mounts") = files.mounts,
        nb::arg("root") = files.root, "Processors of the tightest quota, rounded up; 0: none.");
  nb::class_<StorageFile>(m, "StorageFile", "A file whose reads are measured.")
      .def(nb::init<const std::string&>(), nb::arg("path"), "An existing file.")
      .def_static("scratch", &StorageFile::scratch, nb::arg("folder"),
                  "An empty file without a name, gone with the object.")
      .def("append", &StorageFile::append, nb::arg("bytes"), nb::call_guard<stoker::Unlocked>(),
           "Pseudo-random bytes, stored on return.")
      .def("read", &read_speed, nb::arg("mode"), nb::arg("block"), nb::arg("depth"),
           nb::arg("seconds"), nb::arg("seed") = 1, nb::arg("huge_pages") = true,
           "Random blocks, none twice, none out of memory.")
      .def_prop_ro("nbytes", &StorageFile::nbytes)
      .def_prop_ro("descriptor", &StorageFile::descriptor)
      .def_prop_ro("direct", &StorageFile::direct);
}
