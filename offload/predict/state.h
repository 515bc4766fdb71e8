// The state of a predictor is what it has learnt, as bytes: a header that names the predictor and
// the model's shape, then little-endian fields.
//
//     char[4]  "SKPS"
//     u32      version, 1
//     char[16] predictor, zero-padded
//     i64 x 4  n_layer, n_embd, n_expert, n_expert_used
//     ...      the predictor's own
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>

#include "offload/predict/predictor.h"

namespace stoker {

class StateWriter {
 public:
  StateWriter(std::string_view predictor, const PredictorShape& shape);
  template <class T>
  void value(T v) {
    bytes(&v, sizeof v);
  }
  void bytes(const void* data, size_t n) { out_.append(static_cast<const char*>(data), n); }
  std::string take() { return std::move(out_); }

 private:
  std::string out_;
};

// Throws Error(kOption) for bytes of another predictor, model or version, and for a wrong length.
class StateReader {
 public:
  StateReader(std::string_view bytes, std::string_view predictor, const PredictorShape& shape);
  template <class T>
  T value() {
    static_assert(std::is_trivially_copyable_v<T>);
    T v;
    std::memcpy(&v, bytes(sizeof v).data(), sizeof v);
    return v;
  }
  // Reads an integer in low .. high.
  int64_t integer(const char* what, int64_t low, int64_t high);
  // Reads n finite floats.
  void floats(const char* what, float* out, size_t n);
  // Returns the next n bytes, which live as long as the state.
  std::string_view bytes(size_t n);
  size_t left() const { return rest_.size(); }
  // Throws if any bytes are left.
  void end() const;

 private:
  [[noreturn]] void refuse(const std::string& message) const;
  std::string predictor_;
  std::string_view rest_;
};

}  // namespace stoker
