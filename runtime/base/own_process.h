// The process that made something with threads. A process that is forked from it has a copy of the
// memory, but none of the threads, and locks that they may have held: whatever waits for either
// would wait for ever.
#pragma once

#include <atomic>

namespace stoker {

class OwnProcess {
 public:
  OwnProcess();
  // Whether this is that process.
  bool here() const;
  // Throws Error(kOption) where it is not.
  void require() const;
  // This process is the one from here on.
  void adopt();

 private:
  std::atomic<long> id_;
};

}  // namespace stoker
