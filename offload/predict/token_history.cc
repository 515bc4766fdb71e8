#include "offload/predict/token_history.h"

#include <algorithm>

namespace stoker {

namespace {

size_t hash(int32_t token) { return static_cast<uint32_t>(token) * size_t{2654435761u} >> 7; }

}  // namespace

TokenHistory::TokenHistory(int64_t n_layer, int64_t n_expert_used, int64_t tokens)
    : n_layer_(n_layer),
      used_(n_expert_used),
      size_(tokens),
      entries_(static_cast<size_t>(tokens)),
      taken_(static_cast<size_t>(tokens * n_layer * n_expert_used), kUnknown),
      heads_(kHeads, -1),
      streams_(kStreams) {}

int64_t TokenHistory::nbytes(int64_t n_layer, int64_t n_expert_used, int64_t tokens) {
  return tokens * (n_layer * n_expert_used * int64_t{sizeof(uint16_t)} + int64_t{sizeof(Entry)}) +
         static_cast<int64_t>(kHeads * sizeof(int64_t) +
                              kStreams * (sizeof(Stream) + kReach * sizeof(int64_t)));
}

TokenHistory::Stream& TokenHistory::stream(int64_t id) {
  Stream* oldest = &streams_[0];
  for (Stream& s : streams_) {
    if (s.id == id) return s;
    if (s.step < oldest->step) oldest = &s;
  }
  oldest->id = id;
  oldest->last = -1;
  oldest->match = 0;
  return *oldest;
}

void TokenHistory::begin(const Step& step) {
  ++steps_;
  rows_ = step.rows;
  single_ = step.is_single();
  const bool decodes = step.phase == Phase::kDecode;
  as_foretold_ = decodes;
  row_stream_.clear();
  first_ = next_;
  count_ = step.phase == Phase::kVerify ? 0 : step.size();
  if (count_ == 0) return;
  for (const StepRow& row : step.rows) {
    Stream& stream = this->stream(row.sequence);
    if (as_foretold_) {
      const std::vector<int64_t>& path = stream.path;
      as_foretold_ = stream.match > 0 && !path.empty() && stream.step == steps_ - 1 &&
                     at(path[path.size() > 1 ? 1 : 0]).token == row.token;
    }
    stream.step = steps_;
    const size_t head = hash(row.token) % kHeads;
    Entry& e = at(next_);
    e = {row.token, known(stream.last) ? stream.last : -1, -1, heads_[head]};
    if (e.before >= 0) at(e.before).after = next_;
    heads_[head] = next_;
    std::fill_n(taken(next_, 0), n_layer_ * used_, kUnknown);
    stream.last = next_++;
    stream.match = 0;
    if (decodes) row_stream_.push_back(&stream);
  }
  // What this step's rows take is not known yet: they are found in what came before it.
  for (Stream* s : row_stream_) find(*s);
  for (int64_t i = 0; i < static_cast<int64_t>(row_stream_.size()); ++i) {
    as_foretold_ = as_foretold_ && match(i) > 0;
  }
}

void TokenHistory::take(int64_t layer, const Routes& routes) {
  const int64_t n = static_cast<int64_t>(routes.expert.size()) / used_;
  if (count_ == 0) return;
  // A chunk longer than the ring has already lost its first tokens.
  for (int64_t t = std::max<int64_t>(0, n - size_); t < n; ++t) {
    uint16_t* out = taken(first_ + count_ - n + t, layer);
    for (int64_t j = 0; j < used_; ++j) {
      out[j] = static_cast<uint16_t>(routes.expert[static_cast<size_t>(t * used_ + j)]);
    }
  }
}

int TokenHistory::common(int64_t a, int64_t b) const {
  int n = 0;
  while (n < kMostCommon && known(a) && known(b) && at(a).token == at(b).token) {
    ++n;
    a = at(a).before;
    b = at(b).before;
  }
  return n;
}

void TokenHistory::find(Stream& stream) const {
  const int64_t last = stream.last;
  int64_t best = -1;
  int tried = 0;
  stream.match = 0;
  for (int64_t e = at(last).alike; known(e) && tried < kTried; e = at(e).alike) {
    if (e >= first_ || at(e).token != at(last).token) continue;
    ++tried;
    const int n = common(e, last);
    if (n <= stream.match) continue;
    stream.match = n;
    best = e;
    if (n == kMostCommon) break;
  }
  stream.path.clear();
  for (int64_t e = best; known(e) && e < first_ && stream.path.size() < kReach; e = at(e).after) {
    stream.path.push_back(e);
  }
}

const TokenHistory::Stream* TokenHistory::decoded(int64_t row) const {
  const auto i = static_cast<size_t>(row);
  if (i >= row_stream_.size() || row_stream_[i]->id != rows_[i].sequence) return nullptr;
  return row_stream_[i];
}

int TokenHistory::match(int64_t row) const {
  const Stream* s = decoded(row);
  return s ? s->match : 0;
}

int TokenHistory::bin(int64_t row) const {
  constexpr int kFrom[kBins] = {1, 2, 3, 5, 9, 17};
  int b = 0;
  while (b + 1 < kBins && match(row) >= kFrom[b + 1]) ++b;
  return b;
}

std::span<const uint16_t> TokenHistory::foretold(int64_t ahead, int64_t layer, int64_t row) const {
  const Stream* s = decoded(row);
  if (!s || s->match == 0 || s->path.empty()) return {};
  // Into the row's own token and on from its occurrence, where that was a token of this stream.
  const int64_t period = static_cast<int64_t>(s->path.size());
  if (ahead >= period && at(s->path.back()).after != s->last) return {};
  const int64_t entry = s->path[static_cast<size_t>(ahead % period)];
  const uint16_t* experts = taken_.data() + ((entry % size_) * n_layer_ + layer) * used_;
  if (experts[0] == kUnknown) return {};
  return {experts, static_cast<size_t>(used_)};
}

}  // namespace stoker
