#include "runtime/kv/page_pool.h"

#include <memory>
#include <string>

#include "runtime/base/errors.h"
#include "runtime/base/memory.h"

namespace stoker {

KvPage* PagePool::take(int64_t bytes) {
  auto page = std::make_unique<KvPage>();
  page->data = map_pages(static_cast<uint64_t>(bytes));
  if (!page->data) {
    throw Error(ErrorKind::kBudget,
                "no memory for a page of a KV cache of " + std::to_string(bytes) + " bytes");
  }
  page->bytes = bytes;
  page->owners = 1;
  const std::lock_guard lock(mutex_);
  nbytes_ += bytes;
  return page.release();
}

void PagePool::share(KvPage* page) {
  const std::lock_guard lock(mutex_);
  ++page->owners;
}

void PagePool::give_back(KvPage* page) {
  {
    const std::lock_guard lock(mutex_);
    if (--page->owners > 0) return;
    nbytes_ -= page->bytes;
  }
  unmap_pages(page->data, static_cast<uint64_t>(page->bytes));
  delete page;
}

bool PagePool::shared(const KvPage* page) const {
  const std::lock_guard lock(mutex_);
  return page->owners > 1;
}

int64_t PagePool::nbytes() const {
  const std::lock_guard lock(mutex_);
  return nbytes_;
}

}  // namespace stoker
