// Decides how much to prefetch from what it measures: how often the predictor's first, second, ...
// choice for one, two, ... layers ahead came true, how busy the disk is, and whether tokens are
// faster with prefetch than without.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "offload/predict/predictor.h"

namespace stoker {

enum class PrefetchMode {
  kOff,   // nothing is guessed
  kOn,    // always, at the threshold that suits the disk
  kAuto,  // as long as it pays
};
constexpr const char* kPrefetchModeNames[] = {"off", "on", "auto"};

class Controller {
 public:
  Controller(const PredictorShape& shape, PrefetchMode mode);

  // A chunk begins, and ends. now_s: steady clock; busy_s: seconds that the disk has been busy
  // since the start. An interrupted chunk has no end and does not count.
  void begin(const Step& step, double now_s, double busy_s);
  void end(double now_s, double busy_s);

  // Layers ahead at which to guess, so that a read has time to arrive; a prompt's chunk takes long
  // enough in each layer for one.
  int64_t distance() const { return prompt_ ? 1 : distance_; }
  // A read took this long from its submission to its end.
  void read_took(double seconds) { read_s_ += (seconds - read_s_) * 0.02; }
  int64_t width() const { return width_; }
  bool predicts() const { return mode_ != PrefetchMode::kOff; }
  bool prefetches() const { return active_; }

  // Remembers a guess made at `layer`, and gives the probability of each of its experts from the
  // record so far. resident: whether each is in memory; those that are not come true less often.
  void guessed(int64_t layer, const Guess& guess, std::span<const uint8_t> resident,
               std::vector<float>* probability);
  // The layer's true experts are known: guesses at it are judged.
  void judge(int64_t layer, std::span<const int32_t> experts);
  // Probability below which reading ahead costs more than it brings.
  float threshold() const { return threshold_; }

  // For people: "on, distance 2, threshold 0.45, +12% over demand only".
  std::string description() const;

 private:
  static constexpr int64_t kMaxDistance = 4;
  // Guesses are recorded apart by layers ahead, and those from memory by whether they are at the
  // present token or at the next one.
  static constexpr size_t kRememberedNow = kMaxDistance, kRememberedNext = kMaxDistance + 1;
  static constexpr size_t kKinds = kMaxDistance + 2;
  static constexpr int kBins = 8;  // of a guess's score
  struct Pending {
    bool made = false;
    std::vector<int32_t> experts;
    std::vector<float*> came_true;  // of each expert: the mean that its outcome goes to
  };
  static int bin(float score);
  // Whether a trial need not go on.
  bool loses_clearly() const;
  // Books a decoded token and decides whether to go on as it was.
  void weigh(double token_s, double busy_share);

  PredictorShape shape_;
  PrefetchMode mode_;
  bool active_ = true;
  int64_t distance_ = 1, width_ = 0;
  float threshold_ = 0.5f;
  // Decayed means of outcomes, by kind, resident or not, and score. For each layer: the hidden
  // state changes much from the first to the second, and little between most others. What is
  // remembered is as good for one layer as for another: the first layer's record has them all.
  using Record = std::array<std::array<std::array<float, kBins>, 2>, kKinds>;
  std::vector<Record> came_true_;                     // [n_layer]
  std::vector<std::array<Pending, kKinds>> pending_;  // [n_layer]
  // The trial of prefetch against demand only.
  bool prompt_ = true;                 // the chunk is one
  int64_t rows_ = 0;                   // of the chunk
  double began_s_ = 0, busy_s_ = 0;    // of the chunk
  double read_s_ = 1e-3;               // decayed means: of a unit's read,
  double token_s_ = 0;                 // of a decoded token
  double with_s_ = 0, without_s_ = 0;  // decayed seconds a token
  std::vector<double> times_;          // of the phase's tokens, seconds
  int64_t phase_left_ = 0;             // tokens
  bool trial_ = false;                 // the phase tries the other side
  int64_t backoff_ = 1;                // length of a stay, in units
};

}  // namespace stoker
