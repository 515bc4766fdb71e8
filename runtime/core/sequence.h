// One sequence of tokens on an engine: KV cache, position, the logits after the last token,
// statistics. One thread at a time; others may cancel().
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "runtime/core/activation_sums.h"
#include "runtime/core/engine.h"
#include "runtime/core/row.h"
#include "runtime/kv/kv_cache.h"
#include "runtime/sampling/sampler.h"

namespace stoker {

struct SequenceStats {
  int64_t prompt_tokens = 0;
  double prompt_seconds = 0;
  int64_t decode_tokens = 0;  // decoded or drafted
  double decode_seconds = 0;
  int64_t decode_bytes = 0;  // weight bytes those read: of a batch its part
  StoreCounters experts;     // the parts of what its chunks cost
  StreamCounters stream;
};

class Sequence {
 public:
  // poll is called on the evaluating thread at least every 20 ms of a long evaluation; it throws
  // to interrupt it. It may be empty.
  Sequence(std::shared_ptr<const Engine> engine, std::function<void()> poll);

  int64_t position() const { return position_; }
  int64_t context() const { return kv_.context(); }
  int64_t id() const { return id_; }  // no other sequence of this process has it
  const Engine& engine() const { return *engine_; }
  const SequenceStats& stats() const { return stats_; }
  const KvCache& kv() const { return kv_; }

  // Appends tokens [n], n >= 1, and keeps the logits after the last. An interrupted evaluation
  // leaves position() after the last whole chunk; where that moved it, there are no logits until
  // the next evaluation.
  void eval(std::span<const int32_t> tokens, Phase phase = Phase::kPrompt);
  // Does the same and writes the logits after each token: out [n][n_vocab].
  void eval_all(std::span<const int32_t> tokens, float* out, Phase phase = Phase::kPrompt);
  // Does the same and writes the final-norm hidden state of each token: out [n][n_embd].
  void eval_hidden(std::span<const int32_t> tokens, float* out);
  // Does the same and writes what each layer's feed-forward or router reads: out [n_layer][n]
  // [n_embd]; and, unless it is null, what predictors see: hidden [n_layer + 1][n][n_embd], the
  // embeddings first, then the hidden states at each mixture layer's look-ahead (others stay as
  // they are).
  void eval_taps(std::span<const int32_t> tokens, float* out, float* hidden = nullptr);
  // Does the same and writes -ln p(tokens[i + 1]) after token i: out [n - 1], nats. Unless sums is
  // null, adds the inputs of every product to it, those of the logits included. Throws
  // Error(kOption) if the sums are of another engine.
  void eval_nll(std::span<const int32_t> tokens, double* out, ActivationSums* sums = nullptr);
  // Returns the logits after the last token [n_vocab]. Throws Error(kOption) if there are none.
  const std::vector<float>& logits() const;
  // Returns the final-norm hidden state of the last token [n_embd].
  const std::vector<float>& hidden() const;
  // Chooses a token. Throws Error(kOption) if the sampler is for another vocabulary.
  int32_t sample(Sampler& sampler) const;
  // Makes a step of generation: evaluates `token`, which was chosen before, and chooses the next.
  int32_t decode(int32_t token, Sampler& sampler);
  // Calls sample(), then eval() of the choice; at the end of the context the token is not evaluated
  // and the sequence stays as it is.
  int32_t step(Sampler& sampler);
  // Forgets the tokens from `position` on, and the logits. It forgets all tokens if layers with
  // windows no longer have what the tokens at `position` attend to: position() tells.
  void truncate(int64_t position);
  // Returns a sequence that holds the same; both share the pages of keys and values until one of
  // them writes to a page.
  std::unique_ptr<Sequence> fork();
  void cancel() { cancelled_.store(true, std::memory_order_relaxed); }
  // Takes back a cancel() that came too late to meet an evaluation.
  void forget_cancel() { cancelled_.store(false, std::memory_order_relaxed); }

 private:
  friend class Batch;
  // Returns rows of tokens [n] that all want the same, the last one also to be kept.
  std::vector<Row> rows(std::span<const int32_t> tokens, uint8_t want);
  void run(std::span<const Row> rows, const Outputs& out = {}, Observer* observer = nullptr,
           Phase phase = Phase::kPrompt);
  void interrupt_if_asked();
  // Takes the sequence for one evaluation. Throws Error(kOption) if another thread has it.
  void take();
  void give_back() { busy_.clear(std::memory_order_release); }
  // Holds a sequence for one call.
  struct Held {
    explicit Held(Sequence& sequence) : sequence(sequence) { sequence.take(); }
    ~Held() { sequence.give_back(); }
    Held(const Held&) = delete;
    Held& operator=(const Held&) = delete;
    Sequence& sequence;
  };

  // Counts as an open session of the engine while it lives.
  struct Opened {
    explicit Opened(const Engine& engine) : engine(engine) { engine.open_session(); }
    ~Opened() { engine.close_session(); }
    Opened(const Opened&) = delete;
    Opened& operator=(const Opened&) = delete;
    const Engine& engine;
  };

  std::shared_ptr<const Engine> engine_;
  Opened opened_;
  std::function<void()> poll_;
  std::function<void()> interrupt_;  // interrupt_if_asked(), for those who wait for reads
  KvCache kv_;
  std::atomic<int64_t> position_{0};  // others may ask for it
  bool has_logits_ = false;
  std::vector<float> hidden_;  // [n_embd]
  std::vector<float> logits_;  // [n_vocab]
  SequenceStats stats_;
  const int64_t id_;
  std::atomic<bool> cancelled_{false};
  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  double last_poll_ = 0;
};

}  // namespace stoker
