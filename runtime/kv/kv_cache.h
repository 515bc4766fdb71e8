// Keys and values of one sequence: for each group of layers a table of pages, by block of
// positions. A group with a window keeps the pages that its window needs, and as many more as a
// chunk has positions, for a sequence that goes back.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "runtime/kv/kv_shape.h"
#include "runtime/kv/page_pool.h"

namespace stoker {

class KvCache {
 public:
  // chunk: positions that are appended at once, at most. Layout and pool outlive it.
  KvCache(const KvLayout& layout, PagePool& pool, int64_t context, int64_t chunk);
  ~KvCache();
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  int64_t context() const { return context_; }
  KvHead head(int64_t layer, int64_t kv_head) const {
    const size_t group = layout_.group_of(layer);
    return {tables_[group].data.data(), layout_.keys_at(layer, kv_head),
            layout_.values_at(layer, kv_head), layout_.type()};
  }

  // Drops pages that no window needs any more once positions [begin, end), at most a chunk, are
  // appended.
  void leave_behind(int64_t begin, int64_t end);
  // Returns the bytes of the pages that these positions need besides those that exist.
  int64_t missing(int64_t begin, int64_t end) const;
  // Makes these pages, and copies of shared ones that are written. Throws Error(kBudget) if the
  // system has no memory.
  void reserve(int64_t begin, int64_t end);
  // Forgets positions from `position` on.
  void truncate(int64_t position);
  // Returns the last position, at most `position`, for which everything exists that tokens after it
  // attend to; 0 if windows no longer have it.
  int64_t whole_until(int64_t position) const;
  // Shares all pages of another cache of this layout and pool. This one must be empty.
  void fork(const KvCache& other);

 private:
  struct Table {
    std::vector<KvPage*> pages;   // [blocks], null: none
    std::vector<uint8_t*> data;   // [blocks], of these
    int64_t first = 0, last = 0;  // blocks [first, last) have pages
  };
  // Returns the first block that rows from `begin` on attend to.
  static int64_t first_block(const KvLayout::Group& group, int64_t begin);
  bool to_copy(const Table& table, int64_t begin) const;
  void set(Table& table, int64_t block, KvPage* page);
  void drop(Table& table, int64_t block);

  const KvLayout& layout_;
  PagePool& pool_;
  const int64_t context_, chunk_;
  std::vector<Table> tables_;  // [groups]
};

}  // namespace stoker
