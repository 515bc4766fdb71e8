// What the weight matrices multiply with: sums of the squares of their inputs, column by column.
// Importances for quantizing come from them: an error in a weight matters as much as its input.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "runtime/core/engine.h"
#include "runtime/core/observer.h"

namespace stoker {

class ActivationSums : public Observer {
 public:
  struct Tensor {
    std::string name;
    int64_t cols = 0;
    std::vector<double> squares;  // [experts or 1][cols]
    std::vector<int64_t> counts;  // [experts or 1] tokens
  };

  explicit ActivationSums(std::shared_ptr<const Engine> engine);

  // Adds the inputs of one product: x's rows token_list[0 .. n), or first .. first + n without a
  // list. The caller holds the lease of the engine's pool.
  void product(const Matrix& matrix, const Activations& x, const int32_t* token_list, int64_t first,
               int64_t n) override;

  const Engine& engine() const { return *engine_; }
  // The sums by the tensors' numbers in the file; tensors without input have counts of 0, or none.
  const std::vector<Tensor>& tensors() const { return tensors_; }

 private:
  std::shared_ptr<const Engine> engine_;
  std::vector<Tensor> tensors_;
};

}  // namespace stoker
