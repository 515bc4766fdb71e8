#include "runtime/core/engine.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "kernels_cpu/isa/cpu.h"
#include "runtime/base/errors.h"
#include "runtime/gguf/metadata_keys.h"
#include "runtime/core/forward.h"
#include "offload/pools/cache.h"
#include "runtime/kv/kv_cache.h"
#include "runtime/base/printable.h"

namespace stoker {

namespace {

// By how much a process's size may differ from one run to the next: this part of it, up to a limit.
// Measured: 0.2 MB of 72.
constexpr int64_t kProcessVariesShare = 32;
constexpr int64_t kProcessVariesBytes = int64_t{2} << 20;

// A prompt's chunk: large enough to use each unpacked weight tile many times.
constexpr int64_t kChunk = 512;
// A mixture's scratch grows with tokens x experts used; the chunk shrinks to keep it below this.
constexpr int64_t kMixtureScratch = int64_t{96} << 20;
constexpr int64_t kLeastChunk = 32;
constexpr int64_t kSmallestChunk = 8;  // where not even all weights fit that every token uses
// Under a budget scratch takes at most this part of it: what it takes, the cache lacks.
constexpr int64_t kScratchShare = 12;
constexpr int64_t kDefaultContext = 4096;

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Sets the pointers of `s` for a chunk and a memory that begins at `base` (null: none yet); returns
// the bytes that it needs.
int64_t lay_out_scratch(Scratch& s, const ModelConfig& c, int threads, int64_t chunk,
                        uint8_t* base) {
  int64_t ff = std::max(c.n_ff, c.n_ff_shared);
  int64_t pairs_per_token = 0;
  if (c.is_mixture()) {
    ff = std::max(ff, c.n_ff_expert);
    pairs_per_token = std::max<int64_t>(1, c.n_expert_used);
  }
  const int64_t pairs = chunk * pairs_per_token;
  const int64_t rows = std::max(chunk, pairs);
  // The largest number of columns of any activations.
  const int64_t o = c.n_head * c.head_dim_v;
  const int64_t widest = round_up(std::max({c.n_embd, o, ff}), 64);
  const int64_t gate_floats =
      std::max(chunk * std::max(c.n_ff, c.n_ff_shared), pairs * c.n_ff_expert);
  s.rows = rows;
  s.thread_low = round_up(
      std::max<int64_t>(
          static_cast<int64_t>(matmul_scratch_bytes(widest)),
          std::max({attention_scratch_floats(c.head_dim_v), 3 * c.n_expert, widest}) * 4 + 64),
      64);
  s.thread_bytes = s.thread_low + round_up(Forward::max_piece_values(rows) * 4 + 64, 64);
  const int64_t n_rot = std::max<int64_t>(2, c.rope.n_rot);
  // +16 floats each: whole-vector stores may run over the last row's end.
  struct Part {
    void** pointer;
    int64_t bytes;
  };
  const auto floats = [](int64_t n) { return (n + 16) * static_cast<int64_t>(sizeof(float)); };
  const Part parts[] = {
      {reinterpret_cast<void**>(&s.x), floats(chunk * c.n_embd)},
      {reinterpret_cast<void**>(&s.a), floats(chunk * c.n_embd)},
      {reinterpret_cast<void**>(&s.b), floats(chunk * c.n_embd)},
      {reinterpret_cast<void**>(&s.q), floats(chunk * c.n_head * c.head_dim)},
      {reinterpret_cast<void**>(&s.k), floats(chunk * c.n_head_kv * c.head_dim)},
      {reinterpret_cast<void**>(&s.v), floats(chunk * c.n_head_kv * c.head_dim_v)},
      {reinterpret_cast<void**>(&s.o), floats(chunk * o)},
      {reinterpret_cast<void**>(&s.gate), floats(gate_floats)},
      {reinterpret_cast<void**>(&s.up), floats(gate_floats)},
      {reinterpret_cast<void**>(&s.pairs), floats(rows * (c.is_mixture() ? c.n_embd : 0))},
      {reinterpret_cast<void**>(&s.router), floats(chunk * std::max<int64_t>(1, c.n_expert))},
      {reinterpret_cast<void**>(&s.ahead), floats(c.is_mixture() ? chunk * c.n_embd : 0)},
      {reinterpret_cast<void**>(&s.angles), floats(2 * chunk * n_rot)},
      {reinterpret_cast<void**>(&s.act_q), 2 * rows * widest},
      {reinterpret_cast<void**>(&s.act_scale), floats(2 * rows * (widest / 32))},
      {reinterpret_cast<void**>(&s.act_sum), floats(2 * rows * (widest / 16))},
      {reinterpret_cast<void**>(&s.thread), threads * s.thread_bytes},
  };
  int64_t total = 64;
  uint8_t* at = base;
  if (base) at += (64 - reinterpret_cast<uintptr_t>(base) % 64) % 64;
  for (const Part& p : parts) {
    *p.pointer = at;
    total += round_up(p.bytes, 64);
    if (base) at += round_up(p.bytes, 64);
  }
  return total;
}

int64_t scratch_bytes(const ModelConfig& c, int threads, int64_t chunk) {
  Scratch s;
  return lay_out_scratch(s, c, threads, chunk, nullptr);
}

// Splits a budget: which of the weights that every token uses are pinned, which are streamed, and
// how many tokens a chunk has.
class BudgetSplit {
 public:
  // Sets what depends on the chunk: the scratch, and the pages that windows keep for a chunk.
  using ForChunk = std::function<void(FixedMemory&, int64_t chunk)>;

  // all: bytes of these weights; largest: tokens of the largest chunk.
  BudgetSplit(const GgufFile& file, const Partition& parts, const FixedMemory& others, int64_t all,
              int64_t experts_used, int64_t largest, ForChunk for_chunk)
      : file_(file),
        parts_(parts),
        experts_used_(experts_used),
        least_pinned_(std::min(kLeastChunk, largest)),
        least_streamed_(std::min(kSmallestChunk, largest)),
        for_chunk_(std::move(for_chunk)),
        pinned_(others),
        streamed_(with(plan_stream(parts.pass_order, 0), others)) {
    pinned_.pinned = all;
    for_chunk_(pinned_, least_pinned_);
    for_chunk_(streamed_, least_streamed_);
  }

  // Returns the least memory: with the smallest chunk, and with everything pinned or everything
  // streamed that can be.
  int64_t least_memory() const { return std::min(least(pinned_), least(streamed_)); }

  // Shrinks `chunk` until it fits into the budget, or to the smallest one. Sets `stream` to the
  // weights that are streamed.
  FixedMemory into(int64_t budget, int64_t& chunk, StreamPlan& stream) const {
    const bool all_pinned = budget >= least(pinned_) || least(pinned_) <= least(streamed_);
    FixedMemory fixed = all_pinned ? pinned_ : streamed_;
    const int64_t experts = least_slot_bytes(parts_.layout, experts_used_);
    const int64_t room = budget - memory_margin(budget) - experts;
    const int64_t smallest = all_pinned ? least_pinned_ : least_streamed_;
    for_chunk_(fixed, chunk);
    while (chunk > smallest && fixed.total() > room) {
      chunk = std::max(smallest, chunk / 2);
      for_chunk_(fixed, chunk);
    }
    if (all_pinned) return fixed;
    const int64_t lookup = WeightStream::lookup_bytes(parts_.lookup);
    stream = plan_stream(parts_.pass_order, room - fixed.total() + fixed.ring - lookup);
    return with(stream, fixed);
  }

 private:
  FixedMemory with(const StreamPlan& stream, FixedMemory fixed) const {
    fixed.pinned = TensorMemory::nbytes(parts_.pinned_under(file_, stream)) + stream.pinned_bytes;
    fixed.ring = stream.ring_bytes + WeightStream::lookup_bytes(parts_.lookup);
    return fixed;
  }
  int64_t least(const FixedMemory& fixed) const {
    return stoker::least_memory(fixed, parts_.layout, experts_used_);
  }

  const GgufFile& file_;
  const Partition& parts_;
  const int64_t experts_used_, least_pinned_, least_streamed_;
  const ForChunk for_chunk_;
  FixedMemory pinned_, streamed_;  // with the smallest chunk
};

}  // namespace

LoadPlan plan_load(const GgufFile& file, const EngineOptions& options) {
  check_is_model(file);
  const std::string architecture(file.require_string("general.architecture"));
  const Family& family = find_family(file, architecture);
  check_computation(file, architecture);
  ModelConfig c = read_config(file);
  family.configure(file, c);
  finish_config(file, c);
  Plan p;
  p.isa = active_isa();
  if (options.threads < 0 || options.threads > 1024) {
    throw Error(ErrorKind::kOption, "threads: expected 0 (automatic) to 1024, found " +
                                        std::to_string(options.threads));
  }
  p.threads = options.threads > 0 ? options.threads : default_threads();
  p.context = options.context;
  if (p.context == 0) p.context = std::min(c.context_train, kDefaultContext);
  if (p.context < 1 || p.context > c.context_train) {
    throw Error(ErrorKind::kOption, "context: expected 1 to " + std::to_string(c.context_train) +
                                        " tokens (the model's limit), found " +
                                        std::to_string(options.context));
  }
  const OffloadOptions& o = options.offload;
  if (o.memory < 0) {
    throw Error(ErrorKind::kOption, "memory: expected bytes, found " + std::to_string(o.memory));
  }
  Partition parts = partition(file, c, family.tensors);
  for (const OpCost& w : parts.work) {
    p.token_bytes += w.bytes;
    if (w.part != OpCost::Part::kOutput) p.layer_macs += w.weights;
  }
  p.work = parts.work;
  p.bytes_by_kind = parts.bytes_by_kind;

  int64_t scratch_limit = c.is_mixture() ? kMixtureScratch : INT64_MAX;
  if (o.memory > 0) scratch_limit = std::min(scratch_limit, o.memory / kScratchShare);
  // If tokens attend to later ones, a text is one chunk.
  const int64_t largest = c.causal ? std::min(kChunk, p.context) : p.context;
  const int64_t least = std::min(kLeastChunk, largest);
  const auto scratch = [&](int64_t chunk) { return scratch_bytes(c, p.threads, chunk); };
  p.chunk = largest;
  while (p.chunk > least && scratch(p.chunk) > scratch_limit) {
    p.chunk = std::max(least, p.chunk / 4 * 3);
  }
  FixedMemory fixed;
  fixed.process = o.process_bytes + static_cast<int64_t>(o.predictor_state.size());
  fixed.process_varies = std::min(o.process_bytes / kProcessVariesShare, kProcessVariesBytes);
  if (c.is_mixture()) fixed.process += TokenHistory::nbytes(c.n_layer, c.n_expert_used);
  const KvLayout layout(kv_shape(c), options.kv_type);
  const auto for_chunk = [&](FixedMemory& f, int64_t chunk) {
    f.scratch = scratch(chunk);
    f.kv = layout.nbytes(p.context, chunk);
  };
  p.weight_bytes = TensorMemory::nbytes(file);
  const int64_t all = c.is_mixture() ? TensorMemory::nbytes(parts.kept) : p.weight_bytes;
  const BudgetSplit fit(file, parts, fixed, all, c.n_expert_used, largest, for_chunk);
  p.least_memory = fit.least_memory();
  StreamPlan stream;
  for_chunk(fixed, p.chunk);
  if (o.memory > 0) {
    fixed = fit.into(o.memory, p.chunk, stream);
    p.kv_lent_bytes = lend_to_pinned(stream, fixed.kv);
    p.weight_bytes = fixed.pinned;
    p.streamed_bytes = stream.streamed_bytes;
    p.memory =
        plan_memory(file.path(), o.memory, fixed, parts.layout, parts.working_set, c.n_expert_used);
  }
  p.scratch_bytes = fixed.scratch;
  p.kv_bytes = fixed.kv;
  if (o.memory > 0 && !o.cache && c.is_mixture()) {
    p.memory = ring_only(p.memory, parts.layout, c.n_expert_used);
  }
  if (o.memory > 0 && o.cache && c.is_mixture()) {
    // The experts' cache has what is left of the sequences' part, in whole slots.
    const int64_t left = p.kv_bytes - p.kv_lent_bytes;
    p.memory.first_slots =
        Cache::plan_slots(parts.layout, p.memory.slot_bytes + left, c.n_expert_used);
    p.kv_lent_bytes +=
        std::max<int64_t>(0, bytes_of(parts.layout, p.memory.first_slots) - p.memory.slot_bytes);
  } else {
    p.memory.first_slots = p.memory.slots;
  }
  return {&family, std::move(c), std::move(p), std::move(parts), std::move(stream)};
}

Engine::Engine(std::shared_ptr<const GgufFile> file, const EngineOptions& options,
               const std::function<void()>& poll)
    : file_(std::move(file)), options_(options) {
  LoadPlan plan = plan_load(*file_, options);
  family_ = plan.family;
  config_ = std::move(plan.config);
  plan_ = plan.plan;
  ops_ = &ops_for(plan_.isa);
  load(std::move(plan), poll);
  const ModelConfig& c = config_;
  const bool longrope = c.rope.scaling == RopeScaling::kLongRope;
  const Vector& factors = !longrope                                 ? weights_.rope_factors
                          : plan_.context > c.rope.original_context ? weights_.rope_factors_long
                                                                    : weights_.rope_factors_short;
  rope_ = Rope(c.rope, c.rope.base, true, factors);
  if (c.rope.base_sliding > 0) rope_sliding_ = Rope(c.rope, c.rope.base_sliding, false, {});
  pool_ = std::make_unique<ThreadPool>(plan_.threads);
  plan_.threads = pool_->size();
  kv_layout_ = std::make_unique<KvLayout>(kv_shape(c), options_.kv_type);
  pool_->be_patient(flash() || stream());
  if (flash() || stream()) pool_->stay_in_process();
  allocate_scratch();
}

void Engine::load(LoadPlan plan, const std::function<void()>& poll) {
  const OffloadOptions& o = options_.offload;
  if (o.memory == 0 || (!config_.is_mixture() && !plan.stream.active)) {
    weights_ = load_weights(*file_, config_, family_->tensors, plan_.threads);
    return;
  }
  auto reader = std::make_shared<FlashReader>(file_->shards(), file_->shard_nbytes(), o.io);
  FlashExperts::Options store;
  store.slots = plan_.memory.first_slots;
  store.policy = o.policy;
  store.predictor = o.predictor;
  store.predictor_state = std::move(options_.offload.predictor_state);
  store.prefetch = o.prefetch;
  store.overlap = o.overlap;
  weights_ = load_weights(*file_, config_, family_->tensors, std::move(plan.parts),
                          std::move(plan.stream), std::move(reader), store, poll);
}

void Engine::make_room(int64_t bytes) const {
  if (plan_.memory.budget == 0) return;
  const MemoryPlan& m = plan_.memory;
  // The bytes that nobody else uses: the sequences' planned bytes that are not lent, and what the
  // plan leaves over.
  const int64_t planned =
      m.process + m.pinned + m.ring + m.kv + m.scratch + m.margin + m.slot_bytes;
  const int64_t own =
      plan_.kv_bytes - plan_.kv_lent_bytes + std::max<int64_t>(0, m.budget - planned);
  const int64_t used = kv_pages_.nbytes() + bytes;
  const int64_t wanted = std::max<int64_t>(0, used - own);
  if (lent_ < wanted && stream()) lent_ += stream()->lend(wanted - lent_);
  if (lent_ < wanted && flash()) lent_ += flash()->lend(wanted - lent_);
  if (lent_ > wanted && flash()) lent_ -= flash()->take_back(lent_ - wanted);
  if (lent_ > wanted && stream()) lent_ -= stream()->take_back(lent_ - wanted);
  if (lent_ >= wanted) return;
  throw Error(ErrorKind::kBudget,
              file_->path() + ": memory: expected " + std::to_string(wanted - lent_) +
                  " bytes more for the KV cache of " + std::to_string(sessions_) +
                  " sessions: end some, or name a smaller context or more memory");
}

void Engine::allocate_scratch() {
  const int64_t bytes = plan_.scratch_bytes;
  Scratch& s = scratch_;
  s.memory.reset(static_cast<uint8_t*>(std::calloc(static_cast<size_t>(bytes), 1)));
  if (!s.memory) {
    throw Error(ErrorKind::kBudget, "no memory for " + std::to_string(bytes) + " bytes of scratch");
  }
  lay_out_scratch(s, config_, plan_.threads, plan_.chunk, s.memory.get());
}

}  // namespace stoker
