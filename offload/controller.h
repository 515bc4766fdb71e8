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
  kOn,    // always prefetches, at the threshold that suits the disk
  kAuto,  // prefetches as long as it pays
};
constexpr const char* kPrefetchModeNames[] = {"off", "on", "auto"};

class Controller {
 public:
  Controller(const PredictorShape& shape, PrefetchMode mode);

  // begin() starts a chunk, end() ends it. now_s: steady clock; busy_s: seconds that the disk has
  // been busy since the start. An interrupted chunk has no end() and does not count.
  void begin(const Step& step, double now_s, double busy_s);
  void end(double now_s, double busy_s);

  // Returns how many layers ahead to guess, so that a read has time to arrive. Each layer of a
  // prompt's chunk takes long enough for a read, so that one layer ahead is enough there.
  int64_t distance() const { return prompt_ ? 1 : distance_; }
  // Records that a read took this long from its submission to its end.
  void read_took(double seconds) { read_s_ += (seconds - read_s_) * 0.02; }
  int64_t width() const { return width_; }
  bool predicts() const { return mode_ != PrefetchMode::kOff; }
  bool prefetches() const { return active_; }

  // Remembers a guess made at `layer`, and returns the probability of each of its experts from the
  // record so far. resident: whether each is in memory; those that are not come true less often.
  void guessed(int64_t layer, const Guess& guess, std::span<const uint8_t> resident,
               std::vector<float>* probability);
  // Judges the guesses at a layer, whose true experts are now known.
  void judge(int64_t layer, std::span<const int32_t> experts);
  // Returns the probability below which reading ahead costs more than it brings.
  float threshold() const { return threshold_; }

  // Returns a description for people: "on, distance 2, threshold 0.45, +12% over demand only".
  std::string description() const;

 private:
  static constexpr int64_t kMaxDistance = 4;
  // Guesses are recorded separately by the number of layers ahead; those from the token history by
  // whether they concern the present token or the next one.
  static constexpr size_t kRememberedNow = kMaxDistance, kRememberedNext = kMaxDistance + 1;
  static constexpr size_t kKinds = kMaxDistance + 2;
  static constexpr int kBins = 8;  // bins of a guess's score
  struct Pending {
    bool made = false;
    std::vector<int32_t> experts;
    std::vector<float*> came_true;  // for each expert, the mean that its outcome updates
  };
  static int bin(float score);
  // Returns whether a trial can end early because it clearly loses.
  bool loses_clearly() const;
  // Records a decoded token's time and decides whether prefetching stays as it is.
  void weigh(double token_s, double busy_share);

  PredictorShape shape_;
  PrefetchMode mode_;
  bool active_ = true;
  int64_t distance_ = 1, width_ = 0;
  float threshold_ = 0.5f;
  // Decayed means of outcomes, by kind, resident or not, and score. Each layer has its own record,
  // because the hidden state changes much from the first layer to the second and little between
  // most others. Guesses from the token history are as good for one layer as for another: the first
  // layer's record counts them for all layers.
  using Record = std::array<std::array<std::array<float, kBins>, 2>, kKinds>;
  std::vector<Record> came_true_;                     // [n_layer]
  std::vector<std::array<Pending, kKinds>> pending_;  // [n_layer]
  // The state of the trial of prefetch against demand only.
  bool prompt_ = true;                 // whether the chunk is a prompt's
  int64_t rows_ = 0;                   // rows of the chunk
  double began_s_ = 0, busy_s_ = 0;    // values at the chunk's begin
  double read_s_ = 1e-3;               // decayed means: seconds of a unit's read,
  double token_s_ = 0;                 // seconds of a decoded token
  double with_s_ = 0, without_s_ = 0;  // decayed seconds a token
  std::vector<double> times_;          // seconds of each token of the phase
  int64_t phase_left_ = 0;             // tokens
  bool trial_ = false;                 // whether the phase tries the other side
  int64_t backoff_ = 1;                // length of a stay, in units
};

}  // namespace stoker
