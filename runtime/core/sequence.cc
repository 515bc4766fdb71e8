#include "runtime/core/sequence.h"

#include <algorithm>
#include <chrono>

#include "runtime/base/errors.h"
#include "runtime/core/observer.h"

namespace stoker {

namespace {

constexpr double kPollSeconds = 0.02;

std::atomic<int64_t> sequences{0};  // made so far

double now() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

// Copies what it observes to [..][n][n_embd] arrays, n rows of one sequence.
class Taps : public Observer {
 public:
  Taps(float* out, float* hidden, int64_t n, int64_t n_embd)
      : out_(out), hidden_(hidden), n_(n), n_embd_(n_embd) {}
  void begin(std::span<const int32_t> rows) override { rows_ = rows; }
  void hidden(int64_t il, const float* x) override {
    if (hidden_) copy(x, hidden_ + (il + 1) * n_ * n_embd_);
  }
  void block_input(int64_t il, const float* in) override { copy(in, out_ + il * n_ * n_embd_); }

 private:
  void copy(const float* from, float* to) const {
    for (const int32_t row : rows_) {
      std::copy_n(from, n_embd_, to + row * n_embd_);
      from += n_embd_;
    }
  }

  float* const out_;
  float* const hidden_;
  const int64_t n_, n_embd_;
  std::span<const int32_t> rows_;
};

}  // namespace

Sequence::Sequence(std::shared_ptr<const Engine> engine, std::function<void()> poll)
    : engine_(std::move(engine)),
      opened_(*engine_),
      poll_(std::move(poll)),
      interrupt_([this] { interrupt_if_asked(); }),
      kv_(engine_->kv_layout(), engine_->kv_pages(), engine_->plan().context,
          engine_->plan().chunk),
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

void Sequence::take() {
  if (busy_.test_and_set(std::memory_order_acquire)) {
    throw Error(ErrorKind::kOption,
                "this session is in use by another thread: give each thread its own session");
  }
}

std::vector<Row> Sequence::rows(std::span<const int32_t> tokens, uint8_t want) {
  std::vector<Row> rows;
  rows.reserve(tokens.size());
  for (const int32_t token : tokens) {
    rows.push_back({this, token, position_ + static_cast<int64_t>(rows.size()), want});
  }
  if (!rows.empty()) rows.back().want |= kWantKept;
  return rows;
}

void Sequence::run(std::span<const Row> rows, const Outputs& out, Observer* observer, Phase phase) {
  last_poll_ = now();
  engine_->eval(rows, phase, out, interrupt_, observer);
}

void Sequence::eval(std::span<const int32_t> tokens, Phase phase) {
  run(rows(tokens, kWantNothing), {}, nullptr, phase);
}

void Sequence::eval_all(std::span<const int32_t> tokens, float* out, Phase phase) {
  run(rows(tokens, kWantLogits), {.logits = out}, nullptr, phase);
}

void Sequence::eval_hidden(std::span<const int32_t> tokens, float* out) {
  run(rows(tokens, kWantHidden), {.hidden = out});
}

void Sequence::eval_taps(std::span<const int32_t> tokens, float* out, float* hidden) {
  Taps taps(out, hidden, static_cast<int64_t>(tokens.size()), engine_->config().n_embd);
  run(rows(tokens, kWantNothing), {}, &taps);
}

void Sequence::eval_nll(std::span<const int32_t> tokens, double* out, ActivationSums* sums) {
  if (sums && &sums->engine() != engine_.get()) {
    throw Error(ErrorKind::kOption, "expected the sums of this session's model, found another's");
  }
  std::vector<Row> rows = this->rows(tokens, kWantNothing);
  for (size_t i = 0; i + 1 < rows.size(); ++i) {
    rows[i].want |= kWantNll;
    rows[i].target = rows[i + 1].token;
  }
  run(rows, {.nll = out}, sums);
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

int32_t Sequence::decode(int32_t token, Sampler& sampler) {
  eval(std::span(&token, 1), Phase::kDecode);
  return sample(sampler);
}

int32_t Sequence::step(Sampler& sampler) {
  const int32_t token = sample(sampler);
  if (position_ < context()) eval(std::span(&token, 1), Phase::kDecode);
  return token;
}

void Sequence::truncate(int64_t position) {
  const Held held(*this);
  if (position < 0 || position > position_) {
    throw Error(ErrorKind::kOption, "truncate: expected 0 to " + std::to_string(position_.load()) +
                                        " tokens, found " + std::to_string(position));
  }
  if (position == position_) return;
  has_logits_ = false;
  position = kv_.whole_until(position);
  kv_.truncate(position);
  position_ = position;
}

std::unique_ptr<Sequence> Sequence::fork() {
  const Held held(*this);
  auto forked = std::make_unique<Sequence>(engine_, poll_);
  forked->kv_.fork(kv_);
  forked->position_ = position_.load();
  forked->has_logits_ = has_logits_;
  forked->hidden_ = hidden_;
  forked->logits_ = logits_;
  return forked;
}

}  // namespace stoker
