// The vector operations between the matrix products, one table per ISA. All tables give the same
// bits: ops_body.inc is written once over the 16-float vector of kernels_cpu/isa/vec_*.h.
#pragma once

#include <cstdint>

#include "kernels_cpu/kernel.h"

namespace stoker {

// A KV tile holds kKeyTile positions. The online softmax takes blocks of kAttentionBlock positions
// with fixed bounds, so that a token's result does not depend on the tokens computed beside it.
inline constexpr int kKeyTile = 16;
inline constexpr int kAttentionBlock = 64;

enum class KvType {
#define STOKER_KV_TYPE(name, element) name,
#include "kernels_cpu/ops/kv_types.inc"
#undef STOKER_KV_TYPE
};
constexpr const char* kKvTypeNames[] = {
#define STOKER_KV_TYPE(name, element) #name,
#include "kernels_cpu/ops/kv_types.inc"
#undef STOKER_KV_TYPE
};
constexpr int64_t kKvElementBytes[] = {
#define STOKER_KV_TYPE(name, element) sizeof(element),
#include "kernels_cpu/ops/kv_types.inc"
#undef STOKER_KV_TYPE
};
constexpr int64_t kv_element_bytes(KvType type) {
  return kKvElementBytes[static_cast<size_t>(type)];
}

// One KV head's cache of one layer, in pages of kAttentionBlock positions. In each, from its start:
//   at k: [kAttentionBlock / 16][head_dim][16]  keys of 16 positions side by side, one lane each
//   at v: [kAttentionBlock][head_dim_v]         and 64 readable bytes after them
struct KvHead {
  uint8_t* const* pages = nullptr;  // by position / kAttentionBlock
  int64_t k = 0, v = 0;             // bytes from a page's start
  KvType type = KvType::f16;
};

// Attention of `rows` query rows (token, head) that share one KV head.
struct AttentionArgs {
  KvHead kv;
  int64_t head_dim = 0;    // of q and k
  int64_t head_dim_v = 0;  // of v and the output; both multiples of 8
  int64_t rows = 0;
  const float* const* q = nullptr;  // [rows] -> [head_dim], already scaled
  float* const* out = nullptr;      // [rows] -> [head_dim_v]
  const int64_t* first = nullptr;   // [rows] first position attended to (sliding window)
  const int64_t* last = nullptr;    // [rows] last position attended to (the token's own)
  float softcap = 0.0f;             // 0: none; else s = softcap * tanh(s / softcap)
  float* scratch = nullptr;         // attention_scratch_floats(head_dim_v) floats
};
int64_t attention_scratch_floats(int64_t head_dim_v);

enum class Activation { kSilu, kGelu, kRelu };

struct Ops {
  // y = x / sqrt(mean(x^2) + eps) * w, all [n]; a null w means no weight. y may be x.
  void (*rms_norm)(const float* x, const float* w, float eps, float* y, int64_t n);
  void (*add)(float* y, const float* x, int64_t n);                  // y += x
  void (*add_scaled)(float* y, const float* x, float a, int64_t n);  // y = fma(a, x, y)
  void (*scale)(float* y, float a, int64_t n);                       // y *= a
  void (*softcap)(float* y, float cap, int64_t n);                   // y = cap * tanh(y / cap)
  // gate = activation(gate) * up
  void (*gate_mul)(Activation kind, float* gate, const float* up, int64_t n);
  // error[i] = x[i] - q[i] * scale[i / 32], the error of quantizing x; n is a multiple of 32.
  void (*rounding_error)(const float* x, const int8_t* q, const float* scale, float* error,
                         int64_t n);
  // Rotates one head in place; cos_sin is [2][n_rot / 2]. The pairs are (i, i + n_rot / 2) with
  // neox, else (2i, 2i + 1).
  void (*rope)(float* x, const float* cos_sin, int64_t n_rot, bool neox);
  // Writes one position's key [head_dim] and value [head_dim_v] into the cache.
  void (*store_kv)(const KvHead& kv, int64_t position, const float* k, const float* v,
                   int64_t head_dim, int64_t head_dim_v);
  void (*attention)(const AttentionArgs& args);
};

const Ops& ops_for(Isa isa);

}  // namespace stoker
