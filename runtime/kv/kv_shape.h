// What the layers of a model keep of a token, and how it is cut into pages.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels_cpu/ops/ops.h"

namespace stoker {

struct KvShape {
  int64_t n_head_kv = 0;
  int64_t head_dim = 0, head_dim_v = 0;  // of keys, of values
  std::vector<int64_t> window;           // [n_layer] last positions that are attended to; 0: all
};

// Layers with the same window share pages: a page holds keys and values of kAttentionBlock
// positions of all of them, [layers][n_head_kv] (ops.h: KvHead).
class KvLayout {
 public:
  struct Group {
    int64_t window = 0;
    int64_t n_layer = 0;
    int64_t page_bytes = 0;  // whole pages of the system
  };

  KvLayout(const KvShape& shape, KvType type);

  const std::vector<Group>& groups() const { return groups_; }
  KvType type() const { return type_; }
  size_t group_of(int64_t layer) const { return layers_[static_cast<size_t>(layer)].group; }
  // Return the bytes from a page's start to a head's keys, and to its values.
  int64_t keys_at(int64_t layer, int64_t head) const {
    return (layers_[static_cast<size_t>(layer)].place * n_head_kv_ + head) * head_bytes_;
  }
  int64_t values_at(int64_t layer, int64_t head) const { return keys_at(layer, head) + key_bytes_; }
  // Returns the most pages of a group that a sequence of `context` positions has, evaluated in
  // chunks of `chunk`.
  static int64_t most_pages(const Group& group, int64_t context, int64_t chunk);
  // Returns the bytes of the most pages of all groups.
  int64_t nbytes(int64_t context, int64_t chunk) const;

 private:
  struct Layer {
    size_t group;
    int64_t place;  // in the group
  };
  KvType type_;
  int64_t n_head_kv_, key_bytes_, head_bytes_;  // of one head in one page
  std::vector<Group> groups_;
  std::vector<Layer> layers_;
};

}  // namespace stoker
