// One small network predicts a token's whole path before the first layer: from its embedding and
// the experts of the token before, it computes the experts of every layer. It follows ExpertFlow's
// routing path predictor (He et al., 2024), with one hidden layer in place of a transformer;
// offload/profile/profile_path.py trains it.
//
//     h = relu(W1 (factor * embedding / rms(embedding)) + sum of Wp's rows of the experts + b1)
//     score = W2 h + b2, a row for each expert of each layer
//
// State: i64 H; f32 factor [n_embd]; f32 b1 [H]; Q8_0 W1 [H][n_embd rounded up to 32]; Q8_0 Wp
// [n_layer * n_expert][H]; f32 b2 [n_layer * n_expert]; Q8_0 W2 [n_layer * n_expert][H].
#include <algorithm>
#include <cmath>

#include "offload/predict/horizon.h"
#include "offload/predict/map.h"
#include "offload/predict/predictor.h"
#include "offload/predict/rank.h"

namespace stoker {

namespace {

constexpr int64_t kMostHidden = 4096;

class Path : public Predictor {
 public:
  explicit Path(const PredictorShape& shape)
      : shape_(shape), cols_(map_cols(shape.n_embd)), embedding_(cols_) {}

  void begin(const Step& step) override {
    tokens_ = step.size();
    prompt_ = step.is_prompt();
    ready_ = false;
    horizon_.begin();
    before_.swap(chosen_);
    chosen_.clear();
  }

  void observe(int64_t layer, const Routes& routes) override {
    // The chunk's last token precedes the next chunk.
    const size_t used = static_cast<size_t>(shape_.n_expert_used);
    for (size_t i = routes.expert.size() - used; i < routes.expert.size(); ++i) {
      chosen_.push_back(layer * shape_.n_expert + routes.expert[i]);
    }
  }

  size_t predict(int64_t layer, int64_t distance, int64_t width, RouterProbe& ahead,
                 std::vector<Guess>& guesses) override {
    if (layer < 0) foresee(ahead.hidden());
    if (!ready_) return 0;
    size_t n = 0;
    const Horizon::Layers layers = horizon_.at(layer, distance, shape_.n_layer);
    for (int64_t l = layers.first; l <= layers.last; ++l) {
      if (!shape_.mixture[static_cast<size_t>(l)]) continue;
      if (guesses.size() == n) guesses.emplace_back();
      Guess& guess = guesses[n++];
      guess.layer = l;
      score(l);
      ranker_.rank(score_.data(), tokens_, prompt_, shape_.n_expert, shape_.n_expert_used, width,
                   guess);
    }
    return n;
  }

  std::string state() const override {
    StateWriter out("path", shape_);
    out.value(n_hidden_);
    floats(out, factor_);
    floats(out, bias_);
    from_embedding_.save(out);
    from_experts_.save(out);
    floats(out, score_bias_);
    to_experts_.save(out);
    return out.take();
  }

  void set_state(std::string_view bytes) override {
    StateReader in(bytes, "path", shape_);
    n_hidden_ = in.integer("hidden values", 32, kMostHidden) / 32 * 32;
    const int64_t n_units = shape_.n_layer * shape_.n_expert;
    factor_.resize(static_cast<size_t>(shape_.n_embd));
    in.floats("factors", factor_.data(), factor_.size());
    bias_.resize(static_cast<size_t>(n_hidden_));
    in.floats("bias", bias_.data(), bias_.size());
    from_embedding_.load(in, n_hidden_, cols_);
    from_experts_.load(in, n_units, n_hidden_);
    score_bias_.resize(static_cast<size_t>(n_units));
    in.floats("bias", score_bias_.data(), score_bias_.size());
    to_experts_.load(in, n_units, n_hidden_);
    in.end();
    hidden_ = MapInput(n_hidden_);
  }

 private:
  static void floats(StateWriter& out, const std::vector<float>& values) {
    out.bytes(values.data(), values.size() * sizeof(float));
  }

  // Fills h_ from the embeddings [tokens][n_embd].
  void foresee(const float* embeddings) {
    ready_ = true;
    h_.resize(static_cast<size_t>(tokens_ * n_hidden_));
    for (int64_t first = 0; first < tokens_; first += MapInput::kBatch) {
      const int64_t n = std::min(MapInput::kBatch, tokens_ - first);
      scaled_.assign(static_cast<size_t>(n * cols_), 0.0f);
      for (int64_t i = 0; i < n; ++i) {
        scale_to_unit(embeddings + (first + i) * shape_.n_embd, factor_.data(), shape_.n_embd,
                      scaled_.data() + i * cols_);
      }
      embedding_.set(scaled_.data(), n);
      from_embedding_.multiply(embedding_, 0, n_hidden_, h_.data() + first * n_hidden_, n_hidden_);
    }
    // All tokens of a chunk pass a layer together, so that only its first one has a known
    // predecessor.
    for (int64_t unit : before_) from_experts_.add_row(unit, row_, h_.data());
    for (int64_t i = 0; i < tokens_; ++i) {
      float* h = h_.data() + i * n_hidden_;
      for (int64_t j = 0; j < n_hidden_; ++j) {
        h[j] = std::max(h[j] + bias_[static_cast<size_t>(j)], 0.0f);
      }
    }
  }

  // Fills score_ [tokens][n_expert] for a layer.
  void score(int64_t layer) {
    score_.resize(static_cast<size_t>(tokens_ * shape_.n_expert));
    const float* bias = score_bias_.data() + layer * shape_.n_expert;
    for (int64_t first = 0; first < tokens_; first += MapInput::kBatch) {
      const int64_t n = std::min(MapInput::kBatch, tokens_ - first);
      hidden_.set(h_.data() + first * n_hidden_, n);
      float* out = score_.data() + first * shape_.n_expert;
      to_experts_.multiply(hidden_, layer * shape_.n_expert, shape_.n_expert, out, shape_.n_expert);
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t e = 0; e < shape_.n_expert; ++e) out[i * shape_.n_expert + e] += bias[e];
      }
    }
  }

  PredictorShape shape_;
  int64_t cols_;
  int64_t n_hidden_ = 0;
  std::vector<float> factor_;      // [n_embd]
  std::vector<float> bias_;        // [H]
  std::vector<float> score_bias_;  // [n_layer * n_expert]
  Map from_embedding_;             // [H][cols]
  Map from_experts_;               // [n_layer * n_expert][H]
  Map to_experts_;                 // [n_layer * n_expert][H]
  bool prompt_ = false;
  int64_t tokens_ = 1;  // of this forward pass
  bool ready_ = false;  // whether h_ belongs to this forward pass
  Horizon horizon_;
  std::vector<int64_t> before_;  // layer * n_expert + expert of the token before this chunk
  std::vector<int64_t> chosen_;  // the same of this chunk's last token
  MapInput embedding_, hidden_;
  std::vector<float> scaled_;  // [kBatch][cols]
  std::vector<float> h_;       // [tokens][H]
  std::vector<float> score_;   // [tokens][n_expert]
  std::vector<float> row_;     // [H]
  Ranker ranker_;
};

}  // namespace

std::unique_ptr<Predictor> make_path_predictor(const PredictorShape& shape) {
  return std::make_unique<Path>(shape);
}

}  // namespace stoker
