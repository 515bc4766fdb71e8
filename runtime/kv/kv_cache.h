// Keys and values of one sequence, all layers, in one zero-initialised allocation whose pages the
// system provides as they are first written. ops.h gives the layout of a head.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "kernels_cpu/ops/ops.h"

namespace stoker {

struct KvShape {
  int64_t n_layer = 0, n_head_kv = 0;
  int64_t head_dim = 0, head_dim_v = 0;  // of keys, of values
};

class KvCache {
 public:
  KvCache(const KvShape& s, int64_t context, bool f16);
  KvHead head(int64_t layer, int64_t kv_head) const;
  int64_t context() const { return context_; }
  // Bytes that a context takes when full.
  static int64_t nbytes(const KvShape& s, int64_t context, bool f16);

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  int64_t n_head_kv_, context_;
  int64_t k_bytes_, v_bytes_;  // of one head of one layer
  bool f16_;
  std::unique_ptr<uint8_t, Free> memory_;  // [n_layer][n_head_kv][k_bytes + v_bytes]
};

}  // namespace stoker
