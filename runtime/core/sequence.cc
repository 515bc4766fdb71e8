#include "runtime/core/sequence.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>

#include "runtime/base/errors.h"

namespace stoker {

namespace {

constexpr double kPollSeconds = 0.02;
// Rows of logits that are alive at once where only a number of each is kept.
constexpr int64_t kLogitRows = 16;

std::atomic<int64_t> sequences{0};  // made so far

double now() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

// -ln softmax(logits)[token], sums in double.
double negative_log_probability(const float* logits, int64_t n, int32_t token) {
  const float top = *std::max_element(logits, logits + n);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += std::exp(logits[i] - top);
  return std::log(sum) + static_cast<double>(top) - static_cast<double>(logits[token]);
}

class Busy {
 public:
  explicit Busy(std::atomic_flag& flag) : flag_(flag) {
    if (flag_.test_and_set(std::memory_order_acquire)) {
      throw Error(ErrorKind::kOption,
                  "this session is in use by another thread: give each thread its own session");
    }
  }
  ~Busy() { flag_.clear(std::memory_order_release); }
  Busy(const Busy&) = delete;
  Busy& operator=(const Busy&) = delete;

 private:
  std::atomic_flag& flag_;
};

}  // namespace

Sequence::Sequence(std::shared_ptr<const Engine> engine, std::function<void()> poll)
    : engine_(std::move(engine)),
      opened_(*engine_),
      poll_(std::move(poll)),
      interrupt_([this] { interrupt_if_asked(); }),
      kv_(kv_shape(engine_->config()), engine_->plan().context, engine_->kv_f16()),
      hidden_(static_cast<size_t>(engine_->config().n_embd)),
      logits_(static_cast<size_t>(engine_->config().n_vocab)),
      id_(sequences.fetch_add(1)) {}

void Sequence::interrupt_if_asked() {
  if (cancelled_.load(std::memory_order_relaxed)) {
    cancelled_.store(false, std::memory_order_relaxed);
    throw Error(ErrorKind::kInterrupted, "the session was cancelled");
  }
  const double t = now();
  if (poll_ && t - last_poll_ > kPollSeconds) {
    poll_();
    last_poll_ = now();
  }
}

void Sequence::run(std::span<const int32_t> tokens, const Sink& sink, float* taps, float* hidden) {
  const Busy busy(busy_);
  const int64_t n = static_cast<int64_t>(tokens.size());
  if (n == 0) throw Error(ErrorKind::kOption, "expected at least 1 token, found none");
  if (n > context() - position_) {
    throw Error(ErrorKind::kContext, "the context holds " + std::to_string(context()) +
                                         " tokens: " + std::to_string(position_) +
                                         " are in it and " + std::to_string(n) +
                                         " more do not fit");
  }
  if (!engine_->config().causal && (position_ > 0 || n > engine_->plan().chunk)) {
    throw Error(ErrorKind::kContext,
                "tokens of this model attend to later ones (attention.causal is false): expected a "
                "whole text of at most " +
                    std::to_string(engine_->plan().chunk) + " tokens, found " + std::to_string(n) +
                    " after " + std::to_string(position_));
  }
  const int64_t n_vocab = engine_->config().n_vocab;
  for (int32_t t : tokens) {
    if (t < 0 || t >= n_vocab) {
      throw Error(ErrorKind::kOption, "token: expected 0 to " + std::to_string(n_vocab - 1) +
                                          ", found " + std::to_string(t));
    }
  }
  const ThreadPool::Lease lease(engine_->pool());
  engine_->settle_sessions();
  const double start = now();
  last_poll_ = start;
  ExpertStore* const experts = engine_->weights().experts.get();
  WeightStream* const stream = engine_->stream();
  for (int64_t first = 0; first < n;) {
    const int64_t count = std::min(engine_->plan().chunk, n - first);
    Forward forward(*engine_, kv_);
    const int64_t n_embd = engine_->config().n_embd;
    if (taps) {
      forward.tap(taps + first * n_embd, hidden ? hidden + first * n_embd : nullptr, n * n_embd);
    }
    const auto chunk = tokens.subspan(static_cast<size_t>(first), static_cast<size_t>(count));
    forward.collect(sums_);
    if (stream) stream->begin(count, &interrupt_);
    forward.begin(chunk, position_);
    if (experts) {
      experts->begin(chunk, id_, &interrupt_);
      forward.look_ahead_first();
    }
    for (int64_t il = 0; il < engine_->config().n_layer; ++il) {
      interrupt_if_asked();
      engine_->family().layer(forward, il);
    }
    if (experts) experts->end();
    if (sink) sink(forward, first, count);
    forward.collect(nullptr);  // the last token's logits were among those of `sink`
    has_logits_ = false;
    // Reads of the output may fail: then these tokens do not count, as where one of a layer's did.
    if (first + count == n) keep_last(forward, count);
    position_ += count;
    first += count;
  }
  const double seconds = now() - start;
  if (n == 1) {
    stats_.decode_tokens += 1;
    stats_.decode_seconds += seconds;
    stats_.decode_bytes += engine_->plan().token_bytes;
  } else {
    stats_.prompt_tokens += n;
    stats_.prompt_seconds += seconds;
  }
}

void Sequence::keep_last(Forward& forward, int64_t n) {
  forward.final_norm(n - 1, 1, hidden_.data());
  forward.logits(hidden_.data(), 1, logits_.data());
  has_logits_ = true;
}

void Sequence::eval(std::span<const int32_t> tokens) { run(tokens, nullptr); }

void Sequence::eval_all(std::span<const int32_t> tokens, float* out) {
  const int64_t n_vocab = engine_->config().n_vocab;
  run(tokens, [&](Forward& forward, int64_t first, int64_t n) {
    forward.final_norm(0, n, forward.a());
    forward.logits(forward.a(), n, out + first * n_vocab);
  });
}

void Sequence::eval_hidden(std::span<const int32_t> tokens, float* out) {
  const int64_t n_embd = engine_->config().n_embd;
  run(tokens, [&](Forward& forward, int64_t first, int64_t n) {
    forward.final_norm(0, n, out + first * n_embd);
  });
}

void Sequence::eval_taps(std::span<const int32_t> tokens, float* out) { run(tokens, nullptr, out); }

void Sequence::eval_hidden_taps(std::span<const int32_t> tokens, float* out, float* hidden) {
  run(tokens, nullptr, out, hidden);
}

void Sequence::eval_nll(std::span<const int32_t> tokens, double* out) {
  const int64_t n_vocab = engine_->config().n_vocab, n_embd = engine_->config().n_embd;
  const int64_t total = static_cast<int64_t>(tokens.size());
  std::vector<float> rows(static_cast<size_t>(kLogitRows * n_vocab));
  run(tokens, [&](Forward& forward, int64_t first, int64_t n) {
    forward.final_norm(0, n, forward.a());
    for (int64_t i = 0; i < n; i += kLogitRows) {
      interrupt_if_asked();
      const int64_t count = std::min(kLogitRows, n - i);
      forward.logits(forward.a() + i * n_embd, count, rows.data());
      engine_->pool().parallel_for(count, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t j = begin; j < end; ++j) {
          const int64_t at = first + i + j;
          if (at + 1 >= total) continue;
          out[at] = negative_log_probability(rows.data() + j * n_vocab, n_vocab,
                                             tokens[static_cast<size_t>(at + 1)]);
        }
      });
    }
  });
}

void Sequence::eval_sums(std::span<const int32_t> tokens, double* out, ActivationSums& sums) {
  if (&sums.engine() != engine_.get()) {
    throw Error(ErrorKind::kOption, "expected the sums of this session's model, found another's");
  }
  struct Collecting {
    explicit Collecting(Sequence& t, ActivationSums& sums) : t(t) { t.sums_ = &sums; }
    ~Collecting() { t.sums_ = nullptr; }
    Sequence& t;
  } const collecting(*this, sums);
  eval_nll(tokens, out);
}

const std::vector<float>& Sequence::logits() const {
  if (!has_logits_) {
    throw Error(ErrorKind::kOption, "no logits: evaluate at least one token first");
  }
  return logits_;
}

const std::vector<float>& Sequence::hidden() const {
  logits();
  return hidden_;
}

int32_t Sequence::sample(Sampler& sampler) const {
  if (sampler.n_vocab() != static_cast<int>(logits_.size())) {
    throw Error(ErrorKind::kOption, "sampler: expected one for " + std::to_string(logits_.size()) +
                                        " tokens, found " + std::to_string(sampler.n_vocab()));
  }
  return sampler.sample(logits().data());
}

int32_t Sequence::step(Sampler& sampler) {
  const int32_t token = sample(sampler);
  if (position_ < context()) eval(std::span(&token, 1));
  return token;
}

void Sequence::truncate(int64_t position) {
  const Busy busy(busy_);
  if (position < 0 || position > position_) {
    throw Error(ErrorKind::kOption, "truncate: expected 0 to " + std::to_string(position_) +
                                        " tokens, found " + std::to_string(position));
  }
  if (position < position_) has_logits_ = false;
  position_ = position;
}

}  // namespace stoker
