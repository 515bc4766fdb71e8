// One evaluation of rows: checks them, cuts them into chunks, and takes each through the layers.
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "runtime/core/engine.h"
#include "runtime/core/forward.h"
#include "runtime/core/observer.h"
#include "runtime/core/row.h"
#include "runtime/core/sequence.h"

namespace stoker {

class Batch {
 public:
  // Holds the sequences of the rows while it lives. poll: called between the layers and at least
  // every 20 ms of waiting for reads; it throws to interrupt. Throws Error: kOption for an empty
  // list, tokens outside the vocabulary, a sequence of another engine or one that is in use;
  // kContext for rows that do not fit.
  Batch(const Engine& engine, std::span<const Row> rows, Phase phase, const Outputs& out,
        Observer* observer, const std::function<void()>& poll);
  ~Batch();
  Batch(const Batch&) = delete;
  Batch& operator=(const Batch&) = delete;

  // Evaluates the rows; takes the pool for one chunk at a time. An interrupted evaluation leaves
  // the sequences after the last whole chunk.
  void run();

 private:
  struct Member {
    Sequence* sequence;
    int64_t rows = 0;   // of the chunk
    bool kept = false;  // it has the logits of its last row
  };
  void check() const;
  void chunk(std::span<const Row> rows);
  // Reserves pages for the chunk's rows.
  void make_room();
  // Computes what the chunk's rows want.
  void outputs(std::span<const Row> rows, Forward& forward);
  void keep(Sequence& sequence, const float* hidden, const float* logits);
  Member& member(const Sequence* sequence);

  const Engine& engine_;
  const std::span<const Row> rows_;
  const Phase phase_;
  Outputs out_;
  Observer* const observer_;
  const std::function<void()>& poll_;
  std::vector<Member> members_;
  int64_t first_ = 0;  // row of the chunk
  std::vector<int32_t> order_;
  std::vector<StepRow> step_rows_;
};

}  // namespace stoker
