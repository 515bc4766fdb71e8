// What flash has cost: counters of the expert store and of streamed weights, of a whole engine
// since its load and, as shares of these, of single sequences.
#pragma once

#include <cstdint>
#include <vector>

namespace stoker {

// THE list of the store's counters. An acquired expert is a hit (in memory), late (its prefetch was
// on the way) or a miss.
#define STOKER_STORE_COUNTERS(X)                                                              \
  X(int64_t, hits)                                                                            \
  X(int64_t, late)                                                                            \
  X(int64_t, misses)                                                                          \
  X(int64_t, prefetches)      /* submitted */                                                 \
  X(int64_t, prefetches_used) /* acquired by the pass that they were made for, late or not */ \
  X(int64_t, cancelled)       /* prefetches that never began */                               \
  X(int64_t, demand_bytes)    /* read from flash */                                           \
  X(int64_t, prefetch_bytes)                                                                  \
  X(int64_t, evictions)                                                                       \
  X(double, stall_s)      /* compute waited for reads */                                      \
  X(int64_t, decode_hits) /* these five while generating only */                              \
  X(int64_t, decode_late)                                                                     \
  X(int64_t, decode_misses)                                                                   \
  X(int64_t, decode_bytes)                                                                    \
  X(double, decode_stall_s)

// The counters of streamed weights.
#define STOKER_STREAM_COUNTERS(X)                                    \
  X(int64_t, bytes)        /* read from flash, rows looked up too */ \
  X(double, stall_s)       /* compute waited for reads */            \
  X(int64_t, decode_bytes) /* these two while generating */          \
  X(double, decode_stall_s)

#define STOKER_MEMBER(type, name) type name = 0;
struct StoreCounters {
  STOKER_STORE_COUNTERS(STOKER_MEMBER)
};
struct StreamCounters {
  STOKER_STREAM_COUNTERS(STOKER_MEMBER)
};
#undef STOKER_MEMBER

struct StoreStatistics : StoreCounters {
  std::vector<int64_t> layer_uses, layer_hits;  // [n_layer]
};

// A sequence's part of what a chunk of `rows` rows cost, with `own` of them: counts are cut up so
// that those of all its sequences add up, `before` rows having had theirs; waiting is everybody's.
inline int64_t share(int64_t gained, int64_t before, int64_t own, int64_t rows) {
  return gained * (before + own) / rows - gained * before / rows;
}
inline double share(double gained, int64_t, int64_t, int64_t) { return gained; }

#define STOKER_ADD(type, name) sum.name += share(after.name - earlier.name, before, own, rows);
inline void add_share(StoreCounters& sum, const StoreCounters& earlier, const StoreCounters& after,
                      int64_t before, int64_t own, int64_t rows) {
  STOKER_STORE_COUNTERS(STOKER_ADD)
}
inline void add_share(StreamCounters& sum, const StreamCounters& earlier,
                      const StreamCounters& after, int64_t before, int64_t own, int64_t rows) {
  STOKER_STREAM_COUNTERS(STOKER_ADD)
}
#undef STOKER_ADD

}  // namespace stoker
