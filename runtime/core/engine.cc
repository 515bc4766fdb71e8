#include "runtime/core/engine.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "kernels_cpu/cpu.h"
#include "runtime/arch/families.h"
#include "runtime/core/errors.h"
#include "runtime/core/forward.h"
#include "runtime/core/kv_cache.h"

namespace stoker {

namespace {

// A prompt's chunk: large enough to use each unpacked weight tile many times.
constexpr int64_t kChunk = 512;
// A mixture's scratch grows with tokens x experts used; the chunk shrinks to keep it below this.
constexpr int64_t kMixtureScratch = int64_t{96} << 20;
constexpr int64_t kLeastChunk = 32;
// Under a budget scratch takes at most this part of it: what it takes, the cache lacks.
constexpr int64_t kScratchShare = 12;
constexpr int64_t kDefaultContext = 4096;

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

const Family& find_family(const GgufFile& file, const std::string& architecture) {
  std::string known;
#define STOKER_ARCH(name, family)                    \
  if (architecture == name) return kFamily_##family; \
  known += std::string(known.empty() ? "" : " ") + (name);
#include "runtime/arch/archs.inc"
#undef STOKER_ARCH
  throw Error(ErrorKind::kUnsupported, file.path() + ": general.architecture: expected one of " +
                                           known + ", found " + architecture);
}

}  // namespace

Engine::Engine(std::shared_ptr<const GgufFile> file, const EngineOptions& options,
               const std::function<void()>& poll)
    : file_(std::move(file)), options_(options) {
  const std::string architecture(file_->require_string("general.architecture"));
  family_ = &find_family(*file_, architecture);
  config_ = read_config(*file_);
  family_->configure(*file_, config_);
  const ModelConfig& c = config_;

  plan_.isa = active_isa();
  ops_ = &ops_for(plan_.isa);
  if (options.threads < 0 || options.threads > 1024) {
    throw Error(ErrorKind::kOption, "threads: expected 0 (automatic) to 1024, found " +
                                        std::to_string(options.threads));
  }
  plan_.threads = options.threads > 0 ? options.threads : default_threads();
  plan_.context = options.context;
  if (plan_.context == 0) plan_.context = std::min(c.context_train, kDefaultContext);
  if (plan_.context < 1 || plan_.context > c.context_train) {
    throw Error(ErrorKind::kOption, "context: expected 1 to " + std::to_string(c.context_train) +
                                        " tokens (the model's limit), found " +
                                        std::to_string(options.context));
  }
  plan_.kv_bytes = KvCache::nbytes(c, plan_.context, options.kv_f16);
  load(poll);
  const bool longrope = c.rope.scaling == RopeScaling::kLongRope;
  const Vector& factors = !longrope                                 ? weights_.rope_factors
                          : plan_.context > c.rope.original_context ? weights_.rope_factors_long
                                                                    : weights_.rope_factors_short;
  rope_ = Rope(c.rope, c.rope.base, true, factors);
  if (c.rope.base_sliding > 0) rope_sliding_ = Rope(c.rope, c.rope.base_sliding, false, {});
  pool_ = std::make_unique<ThreadPool>(plan_.threads);
  pool_->be_patient(weights_.flash != nullptr);
  plan_.weight_bytes = weights_.resident_bytes;
  plan_.token_bytes = weights_.token_bytes;
  plan_.layer_macs = weights_.layer_macs;
  allocate_scratch();
}

void Engine::load(const std::function<void()>& poll) {
  const ModelConfig& c = config_;
  const OffloadOptions& o = options_.offload;
  if (o.memory < 0) {
    throw Error(ErrorKind::kOption, "memory: expected bytes, found " + std::to_string(o.memory));
  }
  int64_t scratch_limit = kMixtureScratch;
  if (o.memory > 0) scratch_limit = std::min(scratch_limit, o.memory / kScratchShare);
  int64_t& chunk = plan_.chunk;
  chunk = std::min(kChunk, plan_.context);
  const int64_t least = c.is_mixture() ? std::min(kLeastChunk, chunk) : chunk;
  while (chunk > least && lay_out_scratch(chunk, nullptr) > scratch_limit) {
    chunk = std::max(least, chunk / 4 * 3);
  }
  plan_.scratch_bytes = lay_out_scratch(chunk, nullptr);
  if (o.memory == 0) {
    weights_ = load_weights(*file_, c, plan_.threads);
    return;
  }
  FixedMemory fixed;
  fixed.process = o.process_bytes + static_cast<int64_t>(o.predictor_state.size());
  if (c.is_mixture()) fixed.process += TokenHistory::nbytes(c.n_layer, c.n_expert_used);
  fixed.kv = plan_.kv_bytes;
  fixed.scratch = plan_.scratch_bytes;
  if (!c.is_mixture()) {
    fixed.pinned = static_cast<int64_t>(file_->nbytes());
    const Layout none(0, 0);
    plan_.memory = plan_memory(file_->path(), o.memory, fixed, none, 0, 0);
    weights_ = load_weights(*file_, c, plan_.threads);
    return;
  }
  Partition parts = partition(*file_, c);
  fixed.pinned = TensorMemory::nbytes(parts.kept);
  for (;;) {
    try {
      plan_.memory = plan_memory(file_->path(), o.memory, fixed, parts.layout, parts.working_set,
                                 c.n_expert_used);
      break;
    } catch (const Error&) {
      // The minimum is the minimum of the smallest chunk.
      if (chunk == least) throw;
      chunk = std::max(least, chunk / 2);
      fixed.scratch = plan_.scratch_bytes = lay_out_scratch(chunk, nullptr);
    }
  }
  if (!o.cache) plan_.memory = ring_only(plan_.memory, parts.layout, c.n_expert_used);
  auto reader = std::make_unique<FlashReader>(file_->shards(), file_->shard_nbytes(), o.io);
  FlashExperts::Options store;
  store.slots = plan_.memory.slots;
  store.policy = o.policy;
  store.predictor = o.predictor;
  store.predictor_state = std::move(options_.offload.predictor_state);
  store.prefetch = o.prefetch;
  store.overlap = o.overlap;
  weights_ = load_weights(*file_, c, std::move(parts), std::move(reader), store, poll);
}

void Engine::open_session() const {
  if (!flash()) return;
  const ThreadPool::Lease lease(*pool_);
  {
    const std::lock_guard lock(sessions_mutex_);
    ++sessions_;
  }
  try {
    settle_sessions();
  } catch (...) {
    close_session();
    throw;
  }
}

void Engine::close_session() const {
  if (!flash()) return;
  const std::lock_guard lock(sessions_mutex_);
  --sessions_;
}

void Engine::settle_sessions() const {
  if (!flash()) return;
  const std::lock_guard lock(sessions_mutex_);
  const int64_t wanted = std::max<int64_t>(0, sessions_ - 1) * plan_.kv_bytes;
  if (lent_ < wanted) lent_ += flash()->lend(wanted - lent_);
  if (lent_ > wanted) lent_ -= flash()->take_back(lent_ - wanted);
}

int64_t Engine::lay_out_scratch(int64_t chunk, uint8_t* base) {
  const ModelConfig& c = config_;
  int64_t ff = std::max(c.n_ff, c.n_ff_shared);
  int64_t pairs_per_token = 0;
  if (c.is_mixture()) {
    ff = std::max(ff, c.n_ff_expert);
    pairs_per_token = std::max<int64_t>(1, c.n_expert_used);
  }
  const int64_t pairs = chunk * pairs_per_token;
  const int64_t rows = std::max(chunk, pairs);
  // Columns that activations can have.
  const int64_t o = c.n_head * c.head_dim_v;
  const int64_t widest = round_up(std::max({c.n_embd, o, ff}), 64);
  const int64_t gate_floats =
      std::max(chunk * std::max(c.n_ff, c.n_ff_shared), pairs * c.n_ff_expert);
  Scratch& s = scratch_;
  s.rows = rows;
  s.thread_low =
      round_up(std::max<int64_t>(
                   static_cast<int64_t>(matmul_scratch_bytes(widest)),
                   std::max({attention_scratch_floats(c.head_dim_v), c.n_expert, widest}) * 4 + 64),
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
      {reinterpret_cast<void**>(&s.thread), plan_.threads * s.thread_bytes},
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

void Engine::allocate_scratch() {
  const int64_t bytes = plan_.scratch_bytes;
  Scratch& s = scratch_;
  s.memory.reset(static_cast<uint8_t*>(std::calloc(static_cast<size_t>(bytes), 1)));
  if (!s.memory) {
    throw Error(ErrorKind::kBudget, "no memory for " + std::to_string(bytes) + " bytes of scratch");
  }
  lay_out_scratch(plan_.chunk, s.memory.get());
}

}  // namespace stoker
