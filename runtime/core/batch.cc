#include "runtime/core/batch.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "runtime/base/errors.h"

namespace stoker {

namespace {

// Rows of logits that are alive at once where only a number or the last of each is kept.
constexpr int64_t kLogitRows = 16;

double now() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

// Returns -ln softmax(logits)[token], with sums in double.
double negative_log_probability(const float* logits, int64_t n, int32_t token) {
  const float top = *std::max_element(logits, logits + n);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += std::exp(logits[i] - top);
  return std::log(sum) + static_cast<double>(top) - static_cast<double>(logits[token]);
}

}  // namespace

Batch::Batch(const Engine& engine, std::span<const Row> rows, Phase phase, const Outputs& out,
             Observer* observer, const std::function<void()>& poll)
    : engine_(engine), rows_(rows), phase_(phase), out_(out), observer_(observer), poll_(poll) {
  try {
    for (const Row& row : rows) {
      if (row.sequence && !members_.empty() && members_.back().sequence == row.sequence) continue;
      if (!row.sequence || &row.sequence->engine() != &engine) {
        throw Error(ErrorKind::kOption, "rows: expected sequences of this engine");
      }
      const auto same = [&](const Member& m) { return m.sequence == row.sequence; };
      if (std::any_of(members_.begin(), members_.end(), same)) continue;
      row.sequence->take();
      members_.push_back({row.sequence});
    }
    check();
  } catch (...) {
    for (const Member& m : members_) m.sequence->give_back();
    throw;
  }
}

Batch::~Batch() {
  for (const Member& m : members_) m.sequence->give_back();
}

Batch::Member& Batch::member(const Sequence* sequence) {
  return *std::find_if(members_.begin(), members_.end(),
                       [&](const Member& m) { return m.sequence == sequence; });
}

void Batch::check() const {
  if (rows_.empty()) throw Error(ErrorKind::kOption, "expected at least 1 token, found none");
  const ModelConfig& c = engine_.config();
  for (const Member& m : members_) {
    const int64_t position = m.sequence->position();
    int64_t n = 0;
    bool kept = false;
    for (const Row& row : rows_) {
      if (row.sequence != m.sequence) continue;
      if (kept) throw Error(ErrorKind::kOption, "rows: expected the last row of a sequence kept");
      kept = (row.want & kWantKept) != 0;
      if (row.position != position + n) {
        throw Error(ErrorKind::kOption, "rows: expected position " + std::to_string(position + n) +
                                            ", found " + std::to_string(row.position));
      }
      ++n;
    }
    const int64_t context = m.sequence->context();
    if (n > context - position) {
      throw Error(ErrorKind::kContext, "the context holds " + std::to_string(context) +
                                           " tokens: " + std::to_string(position) +
                                           " are in it and " + std::to_string(n) +
                                           " more do not fit");
    }
    const int64_t chunk = engine_.plan().chunk;
    if (!c.causal && (position > 0 || n > chunk || members_.size() > 1)) {
      throw Error(ErrorKind::kContext,
                  "tokens of this model attend to later ones (attention.causal is false): expected "
                  "a whole text of at most " +
                      std::to_string(chunk) + " tokens, found " + std::to_string(n) + " after " +
                      std::to_string(position));
    }
  }
  const auto check_token = [&](int32_t t) {
    if (t >= 0 && t < c.n_vocab) return;
    throw Error(ErrorKind::kOption, "token: expected 0 to " + std::to_string(c.n_vocab - 1) +
                                        ", found " + std::to_string(t));
  };
  for (const Row& row : rows_) {
    check_token(row.token);
    if (row.want & kWantNll) check_token(row.target);
  }
}

void Batch::run() {
  const int64_t n = static_cast<int64_t>(rows_.size());
  for (first_ = 0; first_ < n;) {
    const int64_t count = std::min(engine_.plan().chunk, n - first_);
    chunk(rows_.subspan(static_cast<size_t>(first_), static_cast<size_t>(count)));
    first_ += count;
  }
}

void Batch::chunk(std::span<const Row> rows) {
  const ThreadPool::Lease lease(engine_.pool());
  for (Member& m : members_) {
    m.rows = 0;
    m.kept = false;
  }
  for (const Row& row : rows) ++member(row.sequence).rows;
  make_room();
  const double start = now();
  FlashExperts* const flash = engine_.flash();
  ExpertStore* const experts = engine_.weights().experts.get();
  WeightStream* const stream = engine_.stream();
  const StoreCounters store_before = flash ? flash->counters() : StoreCounters{};
  const StreamCounters stream_before = stream ? stream->statistics() : StreamCounters{};
  Forward forward(engine_, rows, observer_);
  if (observer_) {
    order_.clear();
    for (const int32_t i : forward.order()) order_.push_back(static_cast<int32_t>(first_) + i);
    observer_->begin(order_);
  }
  if (stream) stream->begin(phase_, &poll_);
  forward.begin();
  if (experts) {
    step_rows_.clear();
    for (const int32_t i : forward.order()) {
      const Row& row = rows[static_cast<size_t>(i)];
      step_rows_.push_back({row.sequence->id(), row.token});
    }
    experts->begin({phase_, step_rows_}, &poll_);
    forward.look_ahead_first();
  }
  for (int64_t il = 0; il < engine_.config().n_layer; ++il) {
    if (poll_) poll_();
    engine_.family().layer(forward, il);
  }
  if (experts) experts->end();
  // Logits that a sequence still has belong to an earlier row.
  for (const Member& m : members_) {
    if (m.rows > 0) m.sequence->has_logits_ = false;
  }
  // A read of the output's weights may fail: then these tokens do not count, as if a read of a
  // layer's weights had failed.
  outputs(rows, forward);
  const double seconds = now() - start;
  const auto n = static_cast<int64_t>(rows.size());
  int64_t before = 0;
  for (const Member& m : members_) {
    if (m.rows == 0) continue;
    Sequence& s = *m.sequence;
    s.position_ += m.rows;
    s.has_logits_ = m.kept;
    if (phase_ == Phase::kPrompt) {
      s.stats_.prompt_tokens += m.rows;
      s.stats_.prompt_seconds += seconds;
    } else {
      s.stats_.decode_tokens += m.rows;
      s.stats_.decode_seconds += seconds;
      s.stats_.decode_bytes += share(engine_.plan().token_bytes, before, m.rows, n);
    }
    if (flash) add_share(s.stats_.experts, store_before, flash->counters(), before, m.rows, n);
    if (stream) add_share(s.stats_.stream, stream_before, stream->statistics(), before, m.rows, n);
    before += m.rows;
  }
}

void Batch::make_room() {
  int64_t bytes = 0;
  for (const Member& m : members_) {
    const int64_t begin = m.sequence->position_;
    m.sequence->kv_.leave_behind(begin, begin + m.rows);
    bytes += m.sequence->kv_.missing(begin, begin + m.rows);
  }
  engine_.make_room(bytes);
  for (const Member& m : members_) {
    const int64_t begin = m.sequence->position_;
    m.sequence->kv_.reserve(begin, begin + m.rows);
  }
}

void Batch::outputs(std::span<const Row> rows, Forward& forward) {
  const int64_t n_embd = engine_.config().n_embd, n_vocab = engine_.config().n_vocab;
  // Collects the rows of the chunk, as Forward numbers them, by what they want.
  std::vector<int32_t> place(rows.size());
  for (size_t i = 0; i < place.size(); ++i) {
    place[static_cast<size_t>(forward.order()[i])] = static_cast<int32_t>(i);
  }
  std::vector<int32_t> hidden, logits, rest;  // indices into rows
  std::vector<int64_t> nll_at(rows.size());   // of each row, where it wants one
  int64_t n_nll = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    const uint8_t want = rows[i].want;
    const auto row = static_cast<int32_t>(i);
    nll_at[i] = n_nll;
    if (want & kWantNll) ++n_nll;
    if (want & kWantHidden) hidden.push_back(row);
    if (want & kWantLogits) logits.push_back(row);
    if ((want & (kWantNll | kWantKept)) && !(want & kWantLogits)) rest.push_back(row);
  }
  std::vector<int32_t> list;
  const auto normed = [&](std::span<const int32_t> of, float* out) {
    list.clear();
    for (const int32_t i : of) list.push_back(place[static_cast<size_t>(i)]);
    forward.final_norm(list, out);
  };
  if (!hidden.empty()) {
    normed(hidden, out_.hidden);
    out_.hidden += static_cast<int64_t>(hidden.size()) * n_embd;
  }
  // Computes the other outputs of rows whose logits are known.
  const auto finish = [&](std::span<const int32_t> of, const float* states, const float* values) {
    const auto n = static_cast<int64_t>(of.size());
    std::vector<double> nll(of.size());
    engine_.pool().parallel_for(n, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t j = begin; j < end; ++j) {
        const Row& row = rows[static_cast<size_t>(of[static_cast<size_t>(j)])];
        if (!(row.want & kWantNll)) continue;
        nll[static_cast<size_t>(j)] =
            negative_log_probability(values + j * n_vocab, n_vocab, row.target);
      }
    });
    for (int64_t j = 0; j < n; ++j) {
      const Row& row = rows[static_cast<size_t>(of[static_cast<size_t>(j)])];
      if (row.want & kWantNll)
        out_.nll[nll_at[static_cast<size_t>(of[static_cast<size_t>(j)])]] =
            nll[static_cast<size_t>(j)];
      if (row.want & kWantKept) keep(*row.sequence, states + j * n_embd, values + j * n_vocab);
    }
  };
  if (!logits.empty()) {
    normed(logits, forward.a());
    forward.logits(forward.a(), static_cast<int64_t>(logits.size()), out_.logits);
    finish(logits, forward.a(), out_.logits);
    out_.logits += static_cast<int64_t>(logits.size()) * n_vocab;
  }
  if (rest.size() == 1 && rows[static_cast<size_t>(rest[0])].want == kWantKept) {
    Sequence& s = *rows[static_cast<size_t>(rest[0])].sequence;
    normed(rest, s.hidden_.data());
    forward.logits(s.hidden_.data(), 1, s.logits_.data());
    member(&s).kept = true;
    return;
  }
  std::vector<float> values;
  for (size_t i = 0; i < rest.size(); i += kLogitRows) {
    if (poll_ && i > 0) poll_();
    const auto block =
        std::span<const int32_t>(rest).subspan(i, std::min<size_t>(kLogitRows, rest.size() - i));
    values.resize(block.size() * static_cast<size_t>(n_vocab));
    normed(block, forward.a());
    forward.logits(forward.a(), static_cast<int64_t>(block.size()), values.data());
    finish(block, forward.a(), values.data());
  }
  out_.nll += n_nll;
}

void Batch::keep(Sequence& sequence, const float* hidden, const float* logits) {
  std::copy_n(hidden, sequence.hidden_.size(), sequence.hidden_.begin());
  std::copy_n(logits, sequence.logits_.size(), sequence.logits_.begin());
  member(&sequence).kept = true;
}

void Engine::eval(std::span<const Row> rows, Phase phase, const Outputs& out,
                  const std::function<void()>& poll, Observer* observer) const {
  Batch(*this, rows, phase, out, observer, poll).run();
}

}  // namespace stoker
