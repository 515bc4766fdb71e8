// An immutable model: file, configuration, weights, plan; and the compute threads and scratch
// memory that its sequences take turns to use.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "offload/flash_experts.h"
#include "offload/plan/planner.h"
#include "runtime/core/model/config.h"
#include "runtime/core/model/family.h"
#include "runtime/kv/kv_shape.h"
#include "runtime/kv/page_pool.h"
#include "runtime/gguf/gguf.h"
#include "kernels_cpu/ops/ops.h"
#include "runtime/core/model/rope.h"
#include "runtime/base/threads.h"
#include "runtime/core/model/weights.h"

namespace stoker {

class Observer;
struct Outputs;
struct Row;

// Which products take their activations in two int8 terms (forward.h) instead of one.
enum class Precision {
  kFast,      // none
  kBalanced,  // q, k, v, routers and output: a sixth of the work, half of the rounding noise;
              // and all products of a sequence's first two tokens (kSinkTokens, forward.h)
  kHigh,      // all: within float32 rounding of exact activations, at twice the arithmetic
};
constexpr const char* kPrecisionNames[] = {"fast", "balanced", "high"};

// How a model runs that may not fit the memory.
struct OffloadOptions {
  int64_t memory = 0;         // bytes of the whole process; 0: everything resident
  int64_t process_bytes = 0;  // of the process before the engine, interpreter included
  IoOptions io;
  std::string policy{kDefaultPolicy};
  std::string predictor{kDefaultPredictor};
  std::string predictor_state;  // of a profile; empty: none
  PrefetchMode prefetch = PrefetchMode::kAuto;
  // These switches serve to measure what the parts are worth.
  bool cache = true;    // false: as few slots as a layer's experts need
  bool overlap = true;  // false: a layer waits for all its reads before it computes
};

struct EngineOptions {
  int threads = 0;      // 0: the physical performance cores
  int64_t context = 0;  // 0: the model's limit, at most 4096
  KvType kv_type = KvType::f16;
  Precision precision = Precision::kBalanced;
  OffloadOptions offload;
};

// Where the memory goes, bytes; fixed at load.
struct Plan {
  Isa isa = Isa::scalar;
  int threads = 1;
  int64_t context = 0;
  int64_t chunk = 0;  // prompt tokens that pass a layer together
  int64_t weight_bytes =
      0;                 // resident from the start: all, or what is neither an expert nor streamed
  int64_t kv_bytes = 0;  // of one sequence at its full context
  // The part of kv_bytes that the experts' cache and pinned weights use until sequences need it.
  int64_t kv_lent_bytes = 0;
  int64_t scratch_bytes = 0;
  int64_t token_bytes = 0;   // weight bytes that one decoded token reads
  int64_t layer_macs = 0;    // multiply-adds of one prompt token (the output's excluded)
  int64_t least_memory = 0;  // the smallest budget that would do
  std::vector<OpCost> work;  // of one decoded token
  std::array<int64_t, kTensorKinds> bytes_by_kind{};  // of the file's tensors, by TensorKind
  int64_t streamed_bytes = 0;  // weights that every forward pass reads from flash
  MemoryPlan memory;           // under a budget
};

// What a load will do, from the header alone.
struct LoadPlan {
  const Family* family = nullptr;
  ModelConfig config;
  Plan plan;
  Partition parts;
  StreamPlan stream;  // empty: what is not an expert fits
};
// Throws Error: kModelFile, kUnsupported, kOption, kBudget.
LoadPlan plan_load(const GgufFile& file, const EngineOptions& options);

// Buffers of one evaluation, used under the pool's lease. T = plan.chunk tokens; all 64-byte
// aligned parts of one allocation.
struct Scratch {
  float* x = nullptr;          // [T][n_embd] residual stream
  float* a = nullptr;          // [T][n_embd] normalised input of a block
  float* b = nullptr;          // [T][n_embd] output of a block
  float* q = nullptr;          // [T][n_head * head_dim]
  float* k = nullptr;          // [T][n_head_kv * head_dim]
  float* v = nullptr;          // [T][n_head_kv * head_dim_v]
  float* o = nullptr;          // [T][n_head * head_dim_v]
  float* gate = nullptr;       // [T or pairs][widest feed-forward]
  float* up = nullptr;         // the same
  float* pairs = nullptr;      // [T * n_expert_used][n_embd] outputs of single experts
  float* router = nullptr;     // [T][n_expert] logits
  float* ahead = nullptr;      // [T][n_embd] input of a later layer's router
  float* angles = nullptr;     // [2][T][n_rot] cos and sin: global and sliding-window layers
  int8_t* act_q = nullptr;     // [2][rows][widest] quantized activations, two terms
  float* act_scale = nullptr;  // [2][rows][widest / 32]
  int32_t* act_sum = nullptr;  // [2][rows][widest / 16]
  uint8_t* thread = nullptr;   // [threads][thread_bytes]
  int64_t thread_bytes = 0;
  int64_t thread_low = 0;  // where a thread's [T][rows of a piece] second terms begin
  int64_t rows = 0;        // rows of act_*: max(T, pairs)
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<uint8_t, Free> memory;
};

class Engine {
 public:
  // poll is called every 20 ms of waiting for reads and may throw; it may be empty. Loads the
  // model.
  Engine(std::shared_ptr<const GgufFile> file, const EngineOptions& options,
         const std::function<void()>& poll = {});
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  const GgufFile& file() const { return *file_; }
  const ModelConfig& config() const { return config_; }
  const Weights& weights() const { return weights_; }
  const Plan& plan() const { return plan_; }
  const Family& family() const { return *family_; }
  const Ops& ops() const { return *ops_; }
  KvType kv_type() const { return options_.kv_type; }
  const KvLayout& kv_layout() const { return *kv_layout_; }
  PagePool& kv_pages() const { return kv_pages_; }
  Precision precision() const { return options_.precision; }
  const Rope& rope(bool sliding) const { return sliding ? rope_sliding_ : rope_; }
  ThreadPool& pool() const { return *pool_; }
  Scratch& scratch() const { return scratch_; }  // under pool()'s lease
  // Returns null unless the experts are on flash.
  FlashExperts* flash() const { return weights_.flash; }
  // Returns null unless weights that every token uses are streamed.
  WeightStream* stream() const { return weights_.stream.get(); }

  // Evaluates rows of any number of sequences and appends them there (batch.h: what it throws).
  // poll: called between the layers and at least every 20 ms of waiting for reads; it throws to
  // interrupt. observer: null if nothing is recorded.
  void eval(std::span<const Row> rows, Phase phase, const Outputs& out,
            const std::function<void()>& poll = {}, Observer* observer = nullptr) const;

  void open_session() const { ++sessions_; }
  void close_session() const { --sessions_; }
  // The number of open sequences, and the bytes that the experts' cache and pinned weights gave up
  // for their pages.
  struct Sessions {
    int64_t open, lent_bytes;
  };
  Sessions sessions() const { return {sessions_, lent_}; }
  // Makes room for `bytes` more of the sequences' pages, and gives back what they no longer need.
  // Under a budget they share the bytes that are planned for one sequence of the full context;
  // beyond these, the experts' cache and pinned weights give up memory. The caller holds pool()'s
  // lease. Throws Error(kBudget) if there is no room.
  void make_room(int64_t bytes) const;

 private:
  void load(LoadPlan plan, const std::function<void()>& poll);
  void allocate_scratch();

  std::shared_ptr<const GgufFile> file_;
  EngineOptions options_;
  const Family* family_ = nullptr;
  ModelConfig config_;
  Weights weights_;
  Plan plan_;
  const Ops* ops_ = nullptr;
  Rope rope_, rope_sliding_;
  mutable std::unique_ptr<ThreadPool> pool_;
  mutable Scratch scratch_;
  std::unique_ptr<const KvLayout> kv_layout_;
  mutable PagePool kv_pages_;
  mutable std::atomic<int64_t> sessions_{0};
  // Bytes that the experts' cache and pinned weights gave up; changed under pool()'s lease.
  mutable std::atomic<int64_t> lent_{0};
};

}  // namespace stoker
