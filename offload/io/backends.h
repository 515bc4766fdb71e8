// Declares the functions that open the backends of io_backends.inc.
#pragma once

#include <memory>

#include "offload/io/files.h"
#include "offload/io/io.h"

namespace stoker {

// They throw Error(kOption) where options.backend, a script included, cannot be used here.
#define STOKER_IO_BACKEND(name, summary)                                       \
  std::unique_ptr<IoBackend> open_##name(std::shared_ptr<const IoFiles> files, \
                                         const IoOptions& options, IoListener* listener);
#include "offload/io/io_backends.inc"
#undef STOKER_IO_BACKEND

}  // namespace stoker
