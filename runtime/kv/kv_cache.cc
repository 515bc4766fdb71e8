#include "runtime/kv/kv_cache.h"

#include <algorithm>
#include <cstring>

namespace stoker {

namespace {

int64_t blocks(int64_t positions) { return (positions + kAttentionBlock - 1) / kAttentionBlock; }

}  // namespace

KvCache::KvCache(const KvLayout& layout, PagePool& pool, int64_t context, int64_t chunk)
    : layout_(layout),
      pool_(pool),
      context_(context),
      chunk_(chunk),
      tables_(layout.groups().size()) {
  for (Table& t : tables_) {
    t.pages.resize(static_cast<size_t>(blocks(context)));
    t.data.resize(t.pages.size());
  }
}

KvCache::~KvCache() { truncate(0); }

void KvCache::set(Table& table, int64_t block, KvPage* page) {
  table.pages[static_cast<size_t>(block)] = page;
  table.data[static_cast<size_t>(block)] = page ? page->data : nullptr;
}

void KvCache::drop(Table& table, int64_t block) {
  if (KvPage* page = table.pages[static_cast<size_t>(block)]) pool_.give_back(page);
  set(table, block, nullptr);
}

int64_t KvCache::first_block(const KvLayout::Group& group, int64_t begin) {
  if (group.window == 0) return 0;
  return std::max<int64_t>(0, begin - group.window + 1) / kAttentionBlock;
}

void KvCache::leave_behind(int64_t begin, int64_t end) {
  for (size_t g = 0; g < tables_.size(); ++g) {
    Table& t = tables_[g];
    const KvLayout::Group& group = layout_.groups()[g];
    const int64_t most = KvLayout::most_pages(group, context_, chunk_);
    // A page that the rows of this chunk attend to is never dropped.
    const int64_t keep = std::min(first_block(group, begin), blocks(end) - most);
    for (; t.first < std::min(keep, t.last); ++t.first) drop(t, t.first);
  }
}

int64_t KvCache::missing(int64_t begin, int64_t end) const {
  int64_t bytes = 0;
  for (size_t g = 0; g < tables_.size(); ++g) {
    const Table& t = tables_[g];
    int64_t pages = std::max<int64_t>(0, blocks(end) - t.last);
    if (to_copy(t, begin)) ++pages;
    bytes += pages * layout_.groups()[g].page_bytes;
  }
  return bytes;
}

// Returns whether rows from `begin` on are written to a page that others share.
bool KvCache::to_copy(const Table& table, int64_t begin) const {
  const int64_t block = begin / kAttentionBlock;
  if (block < table.first || block >= table.last) return false;
  return pool_.shared(table.pages[static_cast<size_t>(block)]);
}

void KvCache::reserve(int64_t begin, int64_t end) {
  for (size_t g = 0; g < tables_.size(); ++g) {
    Table& t = tables_[g];
    const int64_t bytes = layout_.groups()[g].page_bytes;
    if (to_copy(t, begin)) {
      const int64_t block = begin / kAttentionBlock;
      KvPage* own = pool_.take(bytes);
      std::memcpy(own->data, t.data[static_cast<size_t>(block)], static_cast<size_t>(bytes));
      drop(t, block);
      set(t, block, own);
    }
    for (; t.last < blocks(end); ++t.last) set(t, t.last, pool_.take(bytes));
  }
}

void KvCache::truncate(int64_t position) {
  for (Table& t : tables_) {
    while (t.last > blocks(position) && t.last > t.first) drop(t, --t.last);
    if (t.last == t.first) t.first = t.last = std::min(t.first, blocks(position));
  }
  if (position == 0) {
    for (Table& t : tables_) t.first = t.last = 0;
  }
}

int64_t KvCache::whole_until(int64_t position) const {
  for (size_t g = 0; g < tables_.size(); ++g) {
    if (tables_[g].first > first_block(layout_.groups()[g], position)) return 0;
  }
  return position;
}

void KvCache::fork(const KvCache& other) {
  for (size_t g = 0; g < tables_.size(); ++g) {
    Table& t = tables_[g];
    const Table& from = other.tables_[g];
    for (int64_t b = from.first; b < from.last; ++b) {
      KvPage* page = from.pages[static_cast<size_t>(b)];
      pool_.share(page);
      set(t, b, page);
    }
    t.first = from.first;
    t.last = from.last;
  }
}

}  // namespace stoker
