// A pool of threads with blocking reads, which works everywhere (Android forbids io_uring to apps).
#include <memory>
#include <utility>

#include "offload/io/backends.h"
#include "offload/io/reader_pool.h"

namespace stoker {

namespace {

class Pread final : public ReadMethod {
 public:
  explicit Pread(std::shared_ptr<const IoFiles> files) : files_(std::move(files)) {}
  ReadOutcome read(const Read& read, int64_t) override { return files_->read(read); }
  bool merges() const override { return IoFiles::kMerges; }
  bool read_merged(const Read* const* reads, int n, ReadOutcome* outcome) override {
    return files_->read_merged(reads, n, outcome);
  }

 private:
  const std::shared_ptr<const IoFiles> files_;
};

}  // namespace

std::unique_ptr<IoBackend> open_pread_pool(std::shared_ptr<const IoFiles> files,
                                           const IoOptions& options, IoListener* listener) {
  auto method = std::make_unique<Pread>(files);
  return std::make_unique<ReaderPool>("pread_pool", std::move(files), std::move(method),
                                      options.readers, listener);
}

}  // namespace stoker
