#include <atomic>
#include <chrono>
#include <thread>

#include "runtime/bind/bind.h"
#include "runtime/base/errors.h"
#include "runtime/bind/unlocked.h"

namespace nb = nanobind;

namespace stoker {

namespace {

constexpr uint32_t kClosed = 1u << 31;
// Holds kClosed and the number of threads that are between the gate and the lock.
std::atomic<uint32_t> gate{0};
std::atomic<std::thread::id> closer{};  // may pass when it is closed

// Returns whether the thread may take the lock; then it must call passed().
bool pass() {
  if ((gate.fetch_add(1) & kClosed) == 0) return true;
  if (closer.load() == std::this_thread::get_id()) return true;
  gate.fetch_sub(1);
  return false;
}

void passed() { gate.fetch_sub(1); }

PyGILState_STATE relock() {
  if (!pass()) throw Error(ErrorKind::kInterrupted, "the interpreter is ending");
  const PyGILState_STATE state = PyGILState_Ensure();
  passed();
  return state;
}

}  // namespace

Unlocked::Unlocked() : state_(PyEval_SaveThread()) {}

Unlocked::~Unlocked() {
  while (!pass()) std::this_thread::sleep_for(std::chrono::hours(1));
  PyEval_RestoreThread(state_);
  passed();
}

Relocked::Relocked() : state_(relock()) {}
Relocked::~Relocked() { PyGILState_Release(state_); }

void close_gate() {
  closer.store(std::this_thread::get_id());
  gate.fetch_or(kClosed);
  // A thread that has passed gets the lock, and gives it back to this one.
  PyThreadState* const state = PyEval_SaveThread();
  while ((gate.load() & ~kClosed) != 0) std::this_thread::sleep_for(std::chrono::microseconds(50));
  PyEval_RestoreThread(state);
  // Objects that daemon threads refer to are not leaked.
  PyThreadState* const first = PyInterpreterState_ThreadHead(PyInterpreterState_Get());
  if (first && PyThreadState_Next(first)) nb::set_leak_warnings(false);
}

void reset_gate() { gate.store(0); }

}  // namespace stoker

void bind_unlocked(nb::module_& m) {
  m.def("close_gate", stoker::close_gate,
        "Keeps other threads out of the interpreter, which is ending.");
  m.def("reset_gate", stoker::reset_gate, "Forgets the threads that a forked process has not.");
  nb::module_::import_("atexit").attr("register")(m.attr("close_gate"));
  nb::object os = nb::module_::import_("os");
  if (nb::hasattr(os, "register_at_fork")) {
    os.attr("register_at_fork")(nb::arg("after_in_child") = m.attr("reset_gate"));
  }
}
