// The exceptions of the core. Each kind has a Python class in runtime/base/errors.py, named beside
// it below; bindings.cc translates. A message is one line with the file, what was expected and what
// was found.
#pragma once

#include <stdexcept>
#include <string>

namespace stoker {

enum class ErrorKind {
  kModelFile,    // ModelFileError: missing, truncated, corrupt or changed file
  kUnsupported,  // UnsupportedModelError: architecture, type or feature we do not run
  kContext,      // ContextLengthError: more tokens than the session's context
  kBudget,       // BudgetError: does not fit the memory
  kOption,       // OptionError: a bad argument or environment variable
  kInterrupted,  // Cancelled: a cancelled session, or an interpreter that is ending
  kDevice,       // DeviceError: a read failed, an instruction traps
};

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const { return kind_; }

 private:
  ErrorKind kind_;
};

}  // namespace stoker
