// Starts threads to which no signal is delivered: signals belong to the threads of the host program
// (Ctrl-C to the interpreter), and a read that a signal interrupts has to be begun again.
#pragma once

#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "runtime/base/errors.h"

#if defined(__unix__) || defined(__APPLE__)
#include <csignal>
#endif

namespace stoker {

// Throws Error(kDevice) where the system refuses another thread.
template <typename F>
std::thread quiet_thread(F body) {
#if defined(__unix__) || defined(__APPLE__)
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // the thread inherits it
  struct Restore {
    const sigset_t& mask;
    ~Restore() { pthread_sigmask(SIG_SETMASK, &mask, nullptr); }
  } restore{before};
#endif
  try {
    return std::thread(std::move(body));
  } catch (const std::system_error& error) {
    throw Error(ErrorKind::kDevice,
                std::string("expected a thread that reads flash, found that the system gives no "
                            "more (ulimit -u, pids.max): ") +
                    error.what());
  }
}

}  // namespace stoker
