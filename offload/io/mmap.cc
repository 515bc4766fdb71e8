// This backend copies out of a shared map, one page fault at a time, as engines without an I/O
// layer read. It serves as a comparison; it fills the page cache, and the kernel reclaims pages at
// any time.
//
// Touching a page of a map beyond the end of its file kills the process with SIGBUS. Each copy is
// preceded by an fstat, so that a file that was truncated before it fails the job like any other
// change; a truncation in the microseconds between the two still kills the process. That is another
// reason not to use this backend.
#include <cerrno>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#define STOKER_POSIX 1
#endif

#include "offload/io/backends.h"
#include "offload/io/reader_pool.h"
#include "runtime/base/errors.h"

namespace stoker {

#if STOKER_POSIX

namespace {

class MapCopy final : public ReadMethod {
 public:
  explicit MapCopy(std::shared_ptr<const IoFiles> files) : files_(std::move(files)) {
    for (int32_t i = 0; i < files_->size(); ++i) {
      void* base = nullptr;
      if (files_->nbytes(i) > 0) {
        base = ::mmap(nullptr, files_->nbytes(i), PROT_READ, MAP_SHARED, files_->descriptor(i), 0);
      }
      if (base == MAP_FAILED) {
        const int error = errno;
        unmap();
        throw Error(ErrorKind::kDevice, files_->path(i) + ": mmap: " + std::strerror(error));
      }
      maps_.push_back(static_cast<const uint8_t*>(base));
    }
  }

  ~MapCopy() override { unmap(); }

  ReadOutcome read(const Read& r, int64_t) override {
    ReadOutcome outcome;
    const uint64_t size = files_->nbytes(r.file);
    if (r.offset + r.needed > size) {
      outcome.error = files_->failure(r, size > r.offset ? size - r.offset : 0, "");
      return outcome;
    }
    outcome.error = files_->changed(r.file);
    if (!outcome.error.empty()) return outcome;
    std::memcpy(r.into, maps_[static_cast<size_t>(r.file)] + r.offset, r.needed);
    outcome.calls = 1;
    outcome.bytes = static_cast<int64_t>(r.needed);
    return outcome;
  }

 private:
  void unmap() {
    for (size_t i = 0; i < maps_.size(); ++i) {
      if (maps_[i]) {
        ::munmap(const_cast<uint8_t*>(maps_[i]), files_->nbytes(static_cast<int32_t>(i)));
      }
    }
    maps_.clear();
  }

  const std::shared_ptr<const IoFiles> files_;
  std::vector<const uint8_t*> maps_;  // one map a file
};

}  // namespace

std::unique_ptr<IoBackend> open_mmap(std::shared_ptr<const IoFiles> files, const IoOptions& options,
                                     IoListener* listener) {
  auto method = std::make_unique<MapCopy>(files);
  return std::make_unique<ReaderPool>("mmap", std::move(files), std::move(method), options.readers,
                                      listener);
}

#else

std::unique_ptr<IoBackend> open_mmap(std::shared_ptr<const IoFiles>, const IoOptions&,
                                     IoListener*) {
  throw Error(ErrorKind::kOption, "io backend mmap: expected a system with mmap, found none");
}

#endif

}  // namespace stoker
