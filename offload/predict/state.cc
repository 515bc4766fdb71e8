#include "offload/predict/state.h"

#include <algorithm>
#include <cmath>

#include "runtime/base/errors.h"

namespace stoker {

namespace {

constexpr char kMagic[4] = {'S', 'K', 'P', 'S'};
constexpr uint32_t kVersion = 1;
constexpr size_t kNameBytes = 16;

std::string describe(const int64_t (&shape)[4]) {
  return std::to_string(shape[0]) + " layers of " + std::to_string(shape[1]) + " values and " +
         std::to_string(shape[2]) + " experts, " + std::to_string(shape[3]) + " used";
}

}  // namespace

StateWriter::StateWriter(std::string_view predictor, const PredictorShape& shape) {
  char name[kNameBytes] = {};
  std::copy_n(predictor.data(), std::min(predictor.size(), kNameBytes), name);
  bytes(kMagic, sizeof kMagic);
  value(kVersion);
  bytes(name, sizeof name);
  for (int64_t n : {shape.n_layer, shape.n_embd, shape.n_expert, shape.n_expert_used}) value(n);
}

StateReader::StateReader(std::string_view state, std::string_view predictor,
                         const PredictorShape& shape)
    : predictor_(predictor), rest_(state) {
  if (state.empty()) {
    refuse("expected a profile of the model, found none: make one with `stoker profile`");
  }
  if (state.substr(0, sizeof kMagic) != std::string_view(kMagic, sizeof kMagic)) {
    refuse("expected the state of a predictor, found something else");
  }
  bytes(sizeof kMagic);
  const auto version = value<uint32_t>();
  if (version != kVersion) {
    refuse("state: expected version " + std::to_string(kVersion) + ", found " +
           std::to_string(version));
  }
  const std::string_view padded = bytes(kNameBytes);
  std::string name(padded.substr(0, padded.find('\0')));
  for (char& c : name) {
    if (c < ' ' || c > '~') c = '?';
  }
  if (name != predictor) refuse("expected a state of its own, found one of " + name);
  const int64_t expected[4] = {shape.n_layer, shape.n_embd, shape.n_expert, shape.n_expert_used};
  int64_t found[4];
  for (int64_t& n : found) n = value<int64_t>();
  if (!std::equal(expected, expected + 4, found)) {
    refuse("state: expected one of a model with " + describe(expected) + ", found " +
           describe(found));
  }
}

std::string_view StateReader::bytes(size_t n) {
  if (n > rest_.size()) {
    refuse("state: expected " + std::to_string(n) + " more bytes, found " +
           std::to_string(rest_.size()));
  }
  const std::string_view taken = rest_.substr(0, n);
  rest_.remove_prefix(n);
  return taken;
}

int64_t StateReader::integer(const char* what, int64_t low, int64_t high) {
  const auto v = value<int64_t>();
  if (v < low || v > high) {
    refuse(std::string("state: ") + what + ": expected " + std::to_string(low) + " to " +
           std::to_string(high) + ", found " + std::to_string(v));
  }
  return v;
}

void StateReader::floats(const char* what, float* out, size_t n) {
  std::memcpy(out, bytes(n * sizeof(float)).data(), n * sizeof(float));
  if (!std::all_of(out, out + n, [](float v) { return std::isfinite(v); })) {
    refuse(std::string("state: ") + what + ": expected finite numbers");
  }
}

void StateReader::end() const {
  if (!rest_.empty()) {
    refuse("state: expected its end, found " + std::to_string(rest_.size()) + " more bytes");
  }
}

void StateReader::refuse(const std::string& message) const {
  throw Error(ErrorKind::kOption, "predictor " + predictor_ + ": " + message);
}

}  // namespace stoker
