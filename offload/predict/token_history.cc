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
      heads_(kHeads, -1) {}

int64_t TokenHistory::nbytes(int64_t n_layer, int64_t n_expert_used, int64_t tokens) {
  return tokens * (n_layer * n_expert_used * int64_t{sizeof(uint16_t)} + int64_t{sizeof(Entry)}) +
         static_cast<int64_t>(kHeads * sizeof(int64_t));
}

TokenHistory::Stream& TokenHistory::stream(int64_t id) {
  size_t i = 0;
  while (i + 1 < streams_.size() && streams_[i].id != id) ++i;
  if (streams_[i].id != id) streams_[i] = {id, -1};  // replaces the least recently used one
  std::rotate(streams_.begin(), streams_.begin() + static_cast<int64_t>(i),
              streams_.begin() + static_cast<int64_t>(i) + 1);
  return streams_[0];
}

void TokenHistory::begin(int64_t id, std::span<const int32_t> tokens) {
  Stream& stream = this->stream(id);
  const bool foretold = match_ > 0 && !path_.empty() && first_ == stream.last &&
                        tokens.size() == 1 &&
                        at(path_[path_.size() > 1 ? 1 : 0]).token == tokens[0];
  first_ = next_;
  count_ = static_cast<int64_t>(tokens.size());
  for (int32_t token : tokens) {
    Entry& e = at(next_);
    e = {token, known(stream.last) ? stream.last : -1, -1, heads_[hash(token) % kHeads]};
    if (e.before >= 0) at(e.before).after = next_;
    heads_[hash(token) % kHeads] = next_;
    std::fill_n(taken(next_, 0), n_layer_ * used_, kUnknown);
    stream.last = next_++;
  }
  match_ = 0;
  if (tokens.size() == 1) find();
  as_foretold_ = foretold && match_ > 0;
}

void TokenHistory::take(int64_t layer, const Routes& routes) {
  const int64_t n = static_cast<int64_t>(routes.expert.size()) / used_;
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

void TokenHistory::find() {
  int64_t best = -1;
  int tried = 0;
  for (int64_t e = at(first_).alike; known(e) && tried < kTried; e = at(e).alike) {
    if (at(e).token != at(first_).token) continue;
    ++tried;
    const int n = common(e, first_);
    if (n <= match_) continue;
    match_ = n;
    best = e;
    if (n == kMostCommon) break;
  }
  path_.clear();
  for (int64_t e = best; known(e) && e < first_ && path_.size() < kReach; e = at(e).after) {
    path_.push_back(e);
  }
}

int TokenHistory::bin() const {
  constexpr int kFrom[kBins] = {1, 2, 3, 5, 9, 17};
  int b = 0;
  while (b + 1 < kBins && match_ >= kFrom[b + 1]) ++b;
  return b;
}

std::span<const uint16_t> TokenHistory::foretold(int64_t ahead, int64_t layer) const {
  if (match_ == 0 || path_.empty()) return {};
  // Beyond the chunk the lookup continues from its occurrence, where the chunk followed it in the
  // same stream.
  const int64_t period = static_cast<int64_t>(path_.size());
  if (ahead >= period && at(path_.back()).after != first_) return {};
  const int64_t entry = path_[static_cast<size_t>(ahead % period)];
  const uint16_t* experts = taken_.data() + ((entry % size_) * n_layer_ + layer) * used_;
  if (experts[0] == kUnknown) return {};
  return {experts, static_cast<size_t>(used_)};
}

}  // namespace stoker
