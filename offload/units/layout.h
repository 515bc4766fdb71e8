// Layout says where the units of a model lie: in the file (three extents an expert in a stock file,
// one where they were packed together) and in a cache slot, which mirrors the file's pages so that
// direct reads need no copy.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "offload/units/expert_store.h"
#include "offload/io/io.h"
#include "offload/units/unit.h"

namespace stoker {

class Layout {
 public:
  // A matrix of an expert: its shape and format (data null) and its bytes in the file.
  struct Part {
    Matrix matrix;
    Extent extent;
  };
  using Parts = std::array<Part, 3>;  // gate, up, down

  Layout(int64_t n_layer, int64_t n_expert);

  // Throws Error(kModelFile) for a size that does not fit a slot.
  void add(int64_t layer, int64_t expert, const Parts& parts);
  // Groups the units by slot size. It is called once, after the last add().
  void finish();

  int64_t n_layer() const { return n_layer_; }
  int64_t n_expert() const { return n_expert_; }
  int64_t n_units() const { return static_cast<int64_t>(units_.size()); }
  UnitId unit(int64_t layer, int64_t expert) const {
    return static_cast<UnitId>(layer * n_expert_ + expert);
  }
  int64_t layer_of(UnitId u) const { return u / n_expert_; }
  bool has(UnitId u) const { return at(u).n_reads > 0; }
  // Returns gate, up and down of a unit: shapes and formats, data null.
  const std::array<Matrix, 3>& matrices(UnitId u) const { return at(u).matrices; }
  // Returns the weight bytes of a unit.
  int64_t nbytes(UnitId u) const { return at(u).weight_bytes; }
  // Returns the bytes that reading a unit takes from flash.
  int64_t read_bytes(UnitId u) const { return at(u).read_bytes; }

  // Returns the slot sizes in bytes, ascending; they are multiples of kIoAlign.
  const std::vector<int64_t>& class_bytes() const { return class_bytes_; }
  const std::vector<int64_t>& class_units() const { return class_units_; }  // units of each
  int size_class(UnitId u) const { return at(u).size_class; }

  // Fills job.reads for a slot at `slot`.
  void prepare(UnitId u, uint8_t* slot, IoJob& job) const;
  // Returns the expert's matrices in a slot.
  Expert view(UnitId u, const uint8_t* slot) const;

 private:
  struct Unit {
    std::array<Matrix, 3> matrices;
    std::array<uint64_t, 3> at{};  // offset of each matrix in the slot
    std::array<Read, 3> reads;     // `into` unset
    std::array<uint64_t, 3> read_at{};
    int n_reads = 0;
    int size_class = 0;
    int64_t slot_bytes = 0;
    int64_t weight_bytes = 0;
    int64_t read_bytes = 0;
  };
  const Unit& at(UnitId u) const { return units_[static_cast<size_t>(u)]; }

  int64_t n_layer_, n_expert_;
  std::vector<Unit> units_;  // [n_layer * n_expert]; n_reads 0: a layer without experts
  std::vector<int64_t> class_bytes_, class_units_;
};

}  // namespace stoker
