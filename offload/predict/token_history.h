// TokenHistory keeps the tokens that were evaluated, with the experts that each took, and predicts
// from them: where the last tokens occurred before, the same experts are likely to follow again. A
// text repeats itself more than its routers do: names, quotations, code, answers that take up the
// question.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "offload/units/expert_store.h"

namespace stoker {

class TokenHistory {
 public:
  static constexpr int64_t kTokens = 4096;  // tokens remembered at most
  static constexpr int kBins = 6;           // bins of an occurrence's length

  TokenHistory(int64_t n_layer, int64_t n_expert_used, int64_t tokens = kTokens);

  // Begins a chunk of `stream`: tokens that follow those of its last chunk.
  void begin(int64_t stream, std::span<const int32_t> tokens);
  // Records the experts of the chunk's tokens, or of the last of them.
  void take(int64_t layer, const Routes& routes);
  // Returns the token at `index` of the chunk.
  int32_t token(int64_t index) const { return at(first_ + index).token; }

  // Returns how many of the last tokens, up to and including the chunk's one token, agree with the
  // latest of the longest earlier occurrences: 0 for a chunk of several tokens, and where there is
  // none.
  int match() const { return match_; }
  // Returns whether the chunk's token is the one that was predicted when its predecessor was
  // evaluated.
  bool as_foretold() const { return as_foretold_; }
  // Returns 0 .. kBins - 1: match() coarsened, for records of how reliable an occurrence is.
  int bin() const;
  // Returns the experts that the token `ahead` tokens after the occurrence's took at `layer`,
  // [n_expert_used]; an occurrence that runs into the chunk repeats itself. Empty where they are
  // not known.
  std::span<const uint16_t> foretold(int64_t ahead, int64_t layer) const;

  // Returns the bytes of `tokens` tokens and all data kept for them.
  static int64_t nbytes(int64_t n_layer, int64_t n_expert_used, int64_t tokens = kTokens);

 private:
  static constexpr int kMostCommon = 32;  // tokens: longer occurrences are as good
  static constexpr int kTried = 256;      // earlier occurrences of one token that are compared
  static constexpr size_t kReach = 128;   // tokens predicted, if they do not repeat themselves
  static constexpr int kStreams = 16;
  static constexpr size_t kHeads = 1024;
  static constexpr uint16_t kUnknown = UINT16_MAX;
  struct Entry {
    int32_t token = -1;
    int64_t before = -1;  // the entry before it in its stream
    int64_t after = -1;
    int64_t alike = -1;  // the last entry before it with the same hash
  };
  struct Stream {
    int64_t id = -1;
    int64_t last = -1;
  };

  bool known(int64_t entry) const { return entry >= 0 && entry > next_ - 1 - size_; }
  Entry& at(int64_t entry) { return entries_[static_cast<size_t>(entry % size_)]; }
  const Entry& at(int64_t entry) const { return entries_[static_cast<size_t>(entry % size_)]; }
  uint16_t* taken(int64_t entry, int64_t layer) {
    return taken_.data() + ((entry % size_) * n_layer_ + layer) * used_;
  }
  Stream& stream(int64_t id);
  // Returns how many tokens that end at `a` and at `b` are the same.
  int common(int64_t a, int64_t b) const;
  void find();

  const int64_t n_layer_, used_, size_;
  std::vector<Entry> entries_;            // [size], a ring
  std::vector<uint16_t> taken_;           // [size][n_layer][used]
  std::vector<int64_t> heads_;            // [kHeads]: the last entry of each hash
  std::array<Stream, kStreams> streams_;  // the most recently used first
  int64_t next_ = 0;                      // the next entry to be written
  int64_t first_ = 0;                     // first entry of the chunk
  int64_t count_ = 0;                     // tokens of the chunk
  int match_ = 0;
  bool as_foretold_ = false;
  std::vector<int64_t> path_;  // entries from the occurrence's end to the chunk's token, exclusive
};

}  // namespace stoker
