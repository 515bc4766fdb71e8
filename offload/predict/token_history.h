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

  // A step begins, and lives until the next one. Drafted tokens are not remembered.
  void begin(const Step& step);
  // The step's rows took these experts, or the last of them did.
  void take(int64_t layer, const Routes& routes);
  // The token of a row of the step.
  int32_t token(int64_t row) const { return rows_[static_cast<size_t>(row)].token; }
  // Whether the step is one token of one sequence.
  bool is_single() const { return single_; }

  // How many of a row's last tokens, its own last, the latest of the longest earlier occurrences
  // shares: 0 where there is none, and unless the step decodes.
  int match(int64_t row = 0) const;
  // Whether every row of the step is the token that was foretold when its predecessor was decoded.
  bool as_foretold() const { return as_foretold_; }
  // 0 .. kBins - 1: match() coarsened, for records of what an occurrence is worth.
  int bin(int64_t row = 0) const;
  // What the token `ahead` tokens after the row's own took at `layer` there, [n_expert_used]; an
  // occurrence that runs into the row's own token repeats itself. Empty where it is not known.
  std::span<const uint16_t> foretold(int64_t ahead, int64_t layer, int64_t row = 0) const;

  // Returns the bytes of `tokens` tokens and all data kept for them.
  static int64_t nbytes(int64_t n_layer, int64_t n_expert_used, int64_t tokens = kTokens);

 private:
  static constexpr int kMostCommon = 32;  // tokens: longer occurrences are as good
  static constexpr int kTried = 256;      // earlier occurrences of one token that are compared
  static constexpr size_t kReach = 128;   // tokens predicted, if they do not repeat themselves
  static constexpr size_t kStreams = 64;
  static constexpr size_t kHeads = 1024;
  static constexpr uint16_t kUnknown = UINT16_MAX;
  struct Entry {
    int32_t token = -1;
    int64_t before = -1;  // the entry before it in its stream
    int64_t after = -1;
    int64_t alike = -1;  // the last entry before it with the same hash
  };
  // The tokens of one sequence.
  struct Stream {
    int64_t id = -1;
    int64_t last = -1;  // entry
    int64_t step = 0;   // that used it last
    int match = 0;      // of the last entry's occurrence
    // Entries from the occurrence's end to the last entry, exclusive.
    std::vector<int64_t> path;
  };

  bool known(int64_t entry) const { return entry >= 0 && entry > next_ - 1 - size_; }
  Entry& at(int64_t entry) { return entries_[static_cast<size_t>(entry % size_)]; }
  const Entry& at(int64_t entry) const { return entries_[static_cast<size_t>(entry % size_)]; }
  uint16_t* taken(int64_t entry, int64_t layer) {
    return taken_.data() + ((entry % size_) * n_layer_ + layer) * used_;
  }
  Stream& stream(int64_t id);
  // The stream of a row that was decoded; null where others have taken its place.
  const Stream* decoded(int64_t row) const;
  // Tokens that end at `a` and at `b` and are the same.
  int common(int64_t a, int64_t b) const;
  // Looks for the occurrence of a stream's last entry.
  void find(Stream& stream) const;

  const int64_t n_layer_, used_, size_;
  std::vector<Entry> entries_;       // [size], a ring
  std::vector<uint16_t> taken_;      // [size][n_layer][used]
  std::vector<int64_t> heads_;       // [kHeads]: the last entry of each hash
  std::vector<Stream> streams_;      // [kStreams]
  std::vector<Stream*> row_stream_;  // [rows] of a step that decodes, else empty
  std::span<const StepRow> rows_;    // of the step
  int64_t steps_ = 0;                // so far
  int64_t next_ = 0;                 // entry to come
  int64_t first_ = 0;                // of the step's entries
  int64_t count_ = 0;                // of them
  bool single_ = false, as_foretold_ = false;
};

}  // namespace stoker
