#include "runtime/kv/kv_cache.h"

#include "runtime/base/errors.h"

namespace stoker {

namespace {

// Room for whole attention blocks, so that the last block's reads stay inside.
int64_t padded(int64_t context) {
  return (context + kAttentionBlock - 1) / kAttentionBlock * kAttentionBlock;
}

}  // namespace

int64_t KvCache::nbytes(const KvShape& s, int64_t context, bool f16) {
  return s.n_layer * s.n_head_kv * padded(context) * (s.head_dim + s.head_dim_v) * (f16 ? 2 : 4);
}

KvCache::KvCache(const KvShape& s, int64_t context, bool f16)
    : n_head_kv_(s.n_head_kv),
      context_(context),
      k_bytes_(padded(context) * s.head_dim * (f16 ? 2 : 4)),
      v_bytes_(padded(context) * s.head_dim_v * (f16 ? 2 : 4)),
      f16_(f16) {
  const int64_t total = nbytes(s, context, f16);
  // 64 bytes more: a vector load of the last value row may run over its end.
  memory_.reset(static_cast<uint8_t*>(std::calloc(static_cast<size_t>(total) + 64, 1)));
  if (!memory_) {
    throw Error(ErrorKind::kBudget, "no memory for a KV cache of " + std::to_string(total) +
                                        " bytes; a smaller context would fit");
  }
}

KvHead KvCache::head(int64_t layer, int64_t kv_head) const {
  uint8_t* p = memory_.get() + (layer * n_head_kv_ + kv_head) * (k_bytes_ + v_bytes_);
  return {p, p + k_bytes_, f16_};
}

}  // namespace stoker
