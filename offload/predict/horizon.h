// Horizon chooses the layers to guess at: each one once, `distance` ahead; at the start of a
// forward pass also the nearer ones.
#pragma once

#include <algorithm>
#include <cstdint>

namespace stoker {

class Horizon {
 public:
  void begin() { first_ = true; }
  // The layers of a guess made at `layer`: [first, last], empty beyond the last layer.
  struct Layers {
    int64_t first, last;
  };
  Layers at(int64_t layer, int64_t distance, int64_t n_layer) {
    const int64_t first = first_ ? layer + 1 : layer + distance;
    first_ = false;
    return {first, std::min(layer + distance, n_layer - 1)};
  }

 private:
  bool first_ = true;  // no layer has been guessed at in this forward pass
};

}  // namespace stoker
