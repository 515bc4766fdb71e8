// Code that runs without the interpreter's lock (GIL), and the way back.
//
// A daemon thread may still compute when the interpreter ends. Python before 3.14 ends such a
// thread as it asks for the lock, by unwinding its stack, which no C++ frame survives
// (std::terminate). So there is a gate before the lock: the interpreter's exit closes it, and who
// comes then waits there until the process is gone, without a lock and without unwinding. It closes
// as one of atexit's functions: those that were registered before the core was imported are called
// after it, and must not wait for a daemon thread that is in here.
#pragma once

#include <nanobind/nanobind.h>

namespace stoker {

// Releases the lock while it lives. The thread must have the lock when it makes one.
class Unlocked {
 public:
  Unlocked();
  ~Unlocked();
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  PyThreadState* const state_;
};

// Takes the lock again for a moment, inside an Unlocked. Throws Error(kInterrupted) if the
// interpreter is ending, so that what the caller holds is given back before it waits at the gate.
class Relocked {
 public:
  Relocked();
  ~Relocked();
  Relocked(const Relocked&) = delete;
  Relocked& operator=(const Relocked&) = delete;

 private:
  const PyGILState_STATE state_;
};

// Lets no other thread take the lock from here on; the caller still may. For atexit.
void close_gate();
// Resets the gate in a child after fork(), which has none of the threads.
void reset_gate();

}  // namespace stoker
