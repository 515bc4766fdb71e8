// Predicts with linear maps from the hidden state of a layer to the logits of later layers'
// routers, fitted to recorded hidden states by ridge regression towards the routers themselves
// (offload/profile/profile.py). The first source is the token's embedding, before layer 0. The idea
// is M2R2's early alignment (Bae et al., 2025): what a later layer will decide can be read off
// earlier states, but not by its own router as it is.
//
// State: i64 distances; of each source layer -1 .. n_layer - 2: f32 [n_embd] factors of the unit
// RMS hidden state's values (by which Q8_0 sees them at about one size); of each distance: i64 1
// where there is a map: f32 [n_expert] bias, Q8_0 [n_expert][n_embd rounded up to 32].
#include <algorithm>

#include "offload/predict/horizon.h"
#include "offload/predict/map.h"
#include "offload/predict/predictor.h"
#include "offload/predict/rank.h"

namespace stoker {

namespace {

constexpr int64_t kMostDistances = 64;

class Linear : public Predictor {
 public:
  explicit Linear(const PredictorShape& shape)
      : shape_(shape), cols_(map_cols(shape.n_embd)), input_(cols_) {}

  void begin(const Step& step) override {
    tokens_ = step.size();
    prompt_ = step.is_prompt();
    horizon_.begin();
  }

  size_t predict(int64_t layer, int64_t distance, int64_t width, RouterProbe& ahead,
                 std::vector<Guess>& guesses) override {
    const size_t at = static_cast<size_t>(layer + 1);
    if (at >= sources_.size()) return 0;
    const Source& source = sources_[at];
    distance = std::min(distance, static_cast<int64_t>(source.maps.size()));
    const Horizon::Layers layers = horizon_.at(layer, distance, shape_.n_layer);
    if (layers.first > layers.last) return 0;
    const Target* const targets = source.maps.data() + (layers.first - layer - 1);
    const size_t n_maps = static_cast<size_t>(layers.last - layers.first + 1);
    const size_t row = static_cast<size_t>(tokens_ * shape_.n_expert);
    logits_.resize(n_maps * row);
    const float* hidden = ahead.hidden();
    for (int64_t first = 0; first < tokens_; first += MapInput::kBatch) {
      const int64_t n = std::min(MapInput::kBatch, tokens_ - first);
      scaled_.assign(static_cast<size_t>(n * cols_), 0.0f);
      for (int64_t i = 0; i < n; ++i) {
        scale_to_unit(hidden + (first + i) * shape_.n_embd, source.factor.data(), shape_.n_embd,
                      scaled_.data() + i * cols_);
      }
      input_.set(scaled_.data(), n);
      for (size_t d = 0; d < n_maps; ++d) {
        const Target& target = targets[d];
        if (!target.map) continue;
        float* out = logits_.data() + d * row + static_cast<size_t>(first * shape_.n_expert);
        target.map.multiply(input_, 0, shape_.n_expert, out, shape_.n_expert);
        for (int64_t i = 0; i < n; ++i) {
          for (int64_t e = 0; e < shape_.n_expert; ++e) {
            out[i * shape_.n_expert + e] += target.bias[static_cast<size_t>(e)];
          }
        }
      }
    }
    size_t filled = 0;
    for (size_t d = 0; d < n_maps; ++d) {
      if (!targets[d].map) continue;
      if (guesses.size() == filled) guesses.emplace_back();
      Guess& guess = guesses[filled++];
      guess.layer = layers.first + static_cast<int64_t>(d);
      ranker_.rank(logits_.data() + d * row, tokens_, prompt_, shape_.n_expert,
                   shape_.n_expert_used, width, guess);
    }
    return filled;
  }

  std::string state() const override {
    StateWriter out("linear", shape_);
    out.value(static_cast<int64_t>(sources_[0].maps.size()));
    for (const Source& source : sources_) {
      out.bytes(source.factor.data(), source.factor.size() * sizeof(float));
      for (const Target& target : source.maps) {
        out.value(static_cast<int64_t>(target.map ? 1 : 0));
        if (!target.map) continue;
        out.bytes(target.bias.data(), target.bias.size() * sizeof(float));
        target.map.save(out);
      }
    }
    return out.take();
  }

  void set_state(std::string_view bytes) override {
    StateReader in(bytes, "linear", shape_);
    const int64_t distances = in.integer("distances", 1, kMostDistances);
    std::vector<Source> sources(static_cast<size_t>(shape_.n_layer));
    for (size_t s = 0; s < sources.size(); ++s) {
      Source& source = sources[s];
      source.factor.resize(static_cast<size_t>(shape_.n_embd));
      in.floats("factors", source.factor.data(), source.factor.size());
      source.maps.resize(static_cast<size_t>(distances));
      for (size_t d = 0; d < source.maps.size(); ++d) {
        if (in.integer("map", 0, s + d < shape_.mixture.size() && shape_.mixture[s + d]) == 0) {
          continue;
        }
        Target& target = source.maps[d];
        target.bias.resize(static_cast<size_t>(shape_.n_expert));
        in.floats("bias", target.bias.data(), target.bias.size());
        target.map.load(in, shape_.n_expert, cols_);
      }
    }
    in.end();
    sources_ = std::move(sources);
  }

 private:
  struct Target {
    std::vector<float> bias;  // [n_expert]
    Map map;                  // [n_expert][cols]
  };
  struct Source {
    std::vector<float> factor;  // [n_embd]
    std::vector<Target> maps;   // [distances]
  };

  PredictorShape shape_;
  int64_t cols_;
  bool prompt_ = false;
  int64_t tokens_ = 1;
  std::vector<Source> sources_;  // [n_layer]: the embedding, then layers 0 .. n_layer - 2
  Horizon horizon_;
  MapInput input_;
  std::vector<float> scaled_;  // [kBatch][cols]
  std::vector<float> logits_;  // [distances][tokens][n_expert]
  Ranker ranker_;
};

}  // namespace

std::unique_ptr<Predictor> make_linear_predictor(const PredictorShape& shape) {
  return std::make_unique<Linear>(shape);
}

}  // namespace stoker
