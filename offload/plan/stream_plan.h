// Decides which of the weights that every token uses are pinned where not all of them fit, and how
// the others are cut into reads that are streamed through a ring.
#pragma once

#include <cstdint>
#include <vector>

#include "offload/units/unit.h"

namespace stoker {

// Reads of the larger size use all the bandwidth of the disks that we measured.
constexpr int64_t kMostRead = int64_t{1} << 20;
constexpr int64_t kLeastRead = int64_t{128} << 10;
// A ring holds this many reads: some in flight, one in use.
constexpr int64_t kRingReads = 8;

// A matrix of the file that every forward pass uses.
struct StreamTensor {
  int32_t tensor = 0;  // its number in the file
  int64_t rows = 0;
  Extent extent;
  int64_t row_bytes() const { return rows > 0 ? static_cast<int64_t>(extent.bytes) / rows : 0; }
};

// The rows of a tensor that are in one read.
struct StreamPiece {
  int32_t tensor = 0;
  int32_t read = 0;  // index into the plan's reads
  int64_t row_begin = 0, row_end = 0;
  Extent extent;
};

// A read: some rows of a large tensor, or neighbours in the file that are used one after the other.
struct StreamRead {
  int32_t first = 0, last = 0;  // pieces [first, last)
  Extent extent;                // of all pieces and the gaps between them
  bool pinned = false;          // in memory
};

struct StreamPlan {
  bool active = false;              // false: all weights that every token uses are pinned
  std::vector<int32_t> whole;       // tensors that are pinned as a whole, ascending
  std::vector<StreamPiece> pieces;  // pieces of the other tensors, in the order of use
  std::vector<StreamRead> reads;    // reads of these pieces, in the order of their first use
  int64_t pinned_bytes = 0;         // memory of the pinned reads
  int64_t ring_bytes = 0;           // memory that the other reads are streamed through
  int64_t streamed_bytes = 0;       // bytes of the streamed reads: what each forward pass reads
  // Streamed reads that are pinned until their memory is needed elsewhere, in the order in which
  // they leave: any first ones of them are spread evenly over the forward pass.
  std::vector<int32_t> lent;
};

// order: the matrices in the order in which a forward pass uses them; room: memory for the
// pinned ones and for the ring, bytes. Pinned reads are spread evenly over the forward pass, so
// that reads and computation overlap everywhere. Where `room` is too small for that, nothing is
// pinned and the ring is the smallest that works.
StreamPlan plan_stream(const std::vector<StreamTensor>& order, int64_t room);

// Pins streamed reads of at most `bytes` for as long as nobody else needs the memory. Returns their
// bytes.
int64_t lend_to_pinned(StreamPlan& plan, int64_t bytes);

// Returns the bytes of memory that an extent takes as direct reads deliver it: whole pages.
int64_t page_span(const Extent& extent);

}  // namespace stoker
