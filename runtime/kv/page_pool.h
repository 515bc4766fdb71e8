// The pages of all sequences of an engine. A sequence and its forks share the pages of what they
// have in common.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

namespace stoker {

struct KvPage {
  uint8_t* data = nullptr;  // aligned to the system's pages
  int64_t bytes = 0;
  int32_t owners = 0;
};

// For any thread. Nobody may write a page that has another owner.
class PagePool {
 public:
  PagePool() = default;
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;

  // Returns a page of `bytes`, a multiple of the system's page, with one owner and any contents.
  // Throws Error(kBudget) if the system has no memory.
  KvPage* take(int64_t bytes);
  void share(KvPage* page);
  // Takes one owner away; without owners the page's memory goes back to the system.
  void give_back(KvPage* page);
  bool shared(const KvPage* page) const;
  // Returns the bytes of all pages that have an owner.
  int64_t nbytes() const;

 private:
  mutable std::mutex mutex_;
  int64_t nbytes_ = 0;
};

}  // namespace stoker
