#include "runtime/kv/kv_shape.h"

#include <algorithm>

namespace stoker {

namespace {

constexpr int64_t kSystemPage = 4096;
// A vector load of the last value row may run over its end.
constexpr int64_t kReadable = 64;

int64_t blocks(int64_t positions) { return (positions + kAttentionBlock - 1) / kAttentionBlock; }

}  // namespace

KvLayout::KvLayout(const KvShape& s, KvType type)
    : type_(type),
      n_head_kv_(s.n_head_kv),
      key_bytes_(kAttentionBlock * s.head_dim * kv_element_bytes(type)),
      head_bytes_(key_bytes_ + kAttentionBlock * s.head_dim_v * kv_element_bytes(type)) {
  for (const int64_t window : s.window) {
    const auto same = [&](const Group& g) { return g.window == window; };
    auto group = std::find_if(groups_.begin(), groups_.end(), same);
    if (group == groups_.end()) group = groups_.insert(group, {window});
    layers_.push_back({static_cast<size_t>(group - groups_.begin()), group->n_layer++});
  }
  for (Group& g : groups_) {
    const int64_t bytes = g.n_layer * n_head_kv_ * head_bytes_ + kReadable;
    g.page_bytes = (bytes + kSystemPage - 1) / kSystemPage * kSystemPage;
  }
}

int64_t KvLayout::most_pages(const Group& group, int64_t context, int64_t chunk) {
  const int64_t all = blocks(context);
  if (group.window == 0) return all;
  // The pages hold the window before the chunk's first token and the chunk, wherever they begin in
  // a page.
  return std::min(all, blocks(group.window - 1 + chunk) + 1);
}

int64_t KvLayout::nbytes(int64_t context, int64_t chunk) const {
  int64_t total = 0;
  for (const Group& g : groups_) total += most_pages(g, context, chunk) * g.page_bytes;
  return total;
}

}  // namespace stoker
