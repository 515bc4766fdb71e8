#include "offload/io/io.h"

#include <algorithm>
#include <new>
#include <utility>

#include "offload/io/backends.h"
#include "offload/io/files.h"
#include "offload/io/measure.h"
#include "runtime/base/errors.h"

namespace stoker {

namespace {

constexpr int kMaxReaders = 256;

struct Backend {
  const char* name;
  std::unique_ptr<IoBackend> (*open)(std::shared_ptr<const IoFiles>, const IoOptions&, IoListener*);
};

constexpr Backend kBackends[] = {
#define STOKER_IO_BACKEND(name, summary) {#name, open_##name},
#include "offload/io/io_backends.inc"
#undef STOKER_IO_BACKEND
};

[[noreturn]] void refuse_backend(const std::string& name) {
  std::string known = "auto";
  for (const Backend& b : kBackends) known += std::string(", ") + b.name;
  throw Error(ErrorKind::kOption, "io backend: expected one of " + known + ", found " + name);
}

}  // namespace

std::unique_ptr<IoBackend> open_io(const std::vector<std::string>& paths,
                                   const std::vector<uint64_t>& sizes, const IoOptions& options,
                                   IoListener* listener) {
  std::string name = options.backend.substr(0, options.backend.find(':'));
  const bool automatic = options.backend == "auto";
  if (automatic) name = "pread_pool";
  const Backend* backend = std::find_if(std::begin(kBackends), std::end(kBackends),
                                        [&](const Backend& b) { return b.name == name; });
  // Only the null backend takes a script.
  if (backend == std::end(kBackends) || (name != "null" && !automatic && name != options.backend)) {
    refuse_backend(options.backend);
  }
  if (options.readers < 1 || options.readers > kMaxReaders) {
    throw Error(ErrorKind::kOption, "io readers: expected 1 to " + std::to_string(kMaxReaders) +
                                        ", found " + std::to_string(options.readers));
  }
  FileAccess access = options.direct ? FileAccess::kDirect : FileAccess::kBuffered;
  if (name == "mmap" || name == "null") access = FileAccess::kCached;
  const auto files = std::make_shared<const IoFiles>(paths, sizes, access);
  if (automatic && uring_is_faster(files, options)) return open_uring(files, options, listener);
  return backend->open(files, options, listener);
}

}  // namespace stoker
