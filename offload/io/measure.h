// Chooses between the backends that read directly by trying them.
#pragma once

#include <memory>

#include "offload/io/files.h"
#include "offload/io/io.h"

namespace stoker {

// Reads at most 32 MB of the largest file, for about 50 ms, alternating between uring and
// pread_pool, with options.readers. Returns false where uring cannot be used or is not clearly
// faster, and where the file is too small to tell.
bool uring_is_faster(const std::shared_ptr<const IoFiles>& files, const IoOptions& options);

}  // namespace stoker
