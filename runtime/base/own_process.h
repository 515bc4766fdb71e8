// The process that made an object with threads. A process that is forked from it has a copy of the
// memory, but none of the threads, and locks that they may have held: waiting for either would
// never end.
#pragma once

#include <atomic>

namespace stoker {

class OwnProcess {
 public:
  OwnProcess();
  // Returns whether this is that process.
  bool here() const;
  // Throws Error(kOption) where it is not.
  void require() const;
  // Makes this process the one from here on.
  void adopt();

 private:
  std::atomic<long> id_;
};

}  // namespace stoker
