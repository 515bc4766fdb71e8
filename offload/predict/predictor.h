// A predictor guesses the experts of later layers while a layer's own reads are in flight. A wrong
// guess costs at most a read; it never changes a result.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "offload/units/expert_store.h"

namespace stoker {

struct PredictorShape {
  int64_t n_layer = 0;
  int64_t n_embd = 0;
  int64_t n_expert = 0;
  int64_t n_expert_used = 0;
  std::vector<bool> mixture;  // [n_layer] layers that have experts
};

class TokenHistory;

// A guess at one layer: experts in order of likelihood.
struct Guess {
  int64_t layer = 0;        // n_layer and above: a layer of the next token
  bool remembered = false;  // from the history: score is its bin()
  std::vector<int32_t> experts;
  // How sure the predictor is of each expert, falling. In decode: 0 where the expert is as likely
  // as not to be chosen by the row that scores it highest, in units of the spread between experts;
  // the controller learns from outcomes which probability a score stands for.
  std::vector<float> score;
};

class Predictor {
 public:
  virtual ~Predictor() = default;
  // Called once, before the first chunk. The history receives a chunk before begin() is called.
  virtual void follow(const TokenHistory* history) { (void)history; }
  // A chunk of rows begins at layer 0; the step lives until the next one.
  virtual void begin(const Step& step) { (void)step; }
  // What a layer's router chose.
  virtual void observe(int64_t layer, const Routes& routes) { (void)layer, (void)routes; }
  // Guesses at layer + distance, or (at the start of a forward pass) at all layers up to it
  // (horizon.h), as far as the predictor knows them; at most `width` experts a token. Guesses from
  // the history may reach further, up to one token ahead. Fills guesses [0 .. return value) and
  // reuses their storage. layer -1: before the first layer, when the hidden states are the tokens'
  // embeddings.
  virtual size_t predict(int64_t layer, int64_t distance, int64_t width, RouterProbe& ahead,
                         std::vector<Guess>& guesses) = 0;
  // Returns what it has learnt, as bytes to save and load; empty where there is nothing.
  virtual std::string state() const { return {}; }
  // Called once, before all other methods, also with no bytes. Throws Error(kOption) for bytes of
  // another model or predictor, and for no bytes where it needs some.
  virtual void set_state(std::string_view bytes);
};

// Throws Error(kOption) for a name that predictors.inc lacks.
std::unique_ptr<Predictor> make_predictor(std::string_view name, const PredictorShape& shape);
std::vector<std::string_view> predictor_names();
inline constexpr std::string_view kDefaultPredictor = "history";

}  // namespace stoker
