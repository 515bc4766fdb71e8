#include "runtime/base/own_process.h"

#include "runtime/base/errors.h"

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace stoker {

namespace {

long process_id() {
#if defined(__unix__) || defined(__APPLE__)
  return static_cast<long>(::getpid());
#else
  return 0;  // this system has no fork
#endif
}

}  // namespace

OwnProcess::OwnProcess() : id_(process_id()) {}

bool OwnProcess::here() const { return process_id() == id_; }

void OwnProcess::adopt() { id_ = process_id(); }

void OwnProcess::require() const {
  if (here()) return;
  throw Error(ErrorKind::kOption,
              "the model was loaded before this process was forked, which has none of its threads: "
              "load it in the new process");
}

}  // namespace stoker
