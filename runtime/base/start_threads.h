// Threads that share one piece of work with their caller. A system may refuse threads (ulimit -u, a
// control group's pids.max): the others, the caller among them, then do the whole work.
#pragma once

#include <cstddef>
#include <thread>
#include <vector>

namespace stoker {

// Starts n threads, of which thread i in [0, n) runs body(i); fewer where the system gives no more.
template <class F>
std::vector<std::thread> start_threads(int n, const F& body) {
  std::vector<std::thread> threads;
  threads.reserve(n > 0 ? static_cast<size_t>(n) : 0);
  try {
    for (int i = 0; i < n; ++i) threads.emplace_back([body, i] { body(i); });
  } catch (...) {
    // The returned size tells the caller that there are fewer; those that run must be joined.
  }
  return threads;
}

inline void join(std::vector<std::thread>& threads) {
  for (std::thread& t : threads) t.join();
}

}  // namespace stoker
