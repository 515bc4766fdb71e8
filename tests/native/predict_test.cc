// Predictors of a profile on chunks of any length, and on damaged states.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "kernels_cpu/kernel.h"
#include "offload/predict/map.h"
#include "offload/predict/predictor.h"
#include "offload/predict/state.h"
#include "offload/predict/token_history.h"
#include "runtime/base/errors.h"

using namespace stoker;

namespace {

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (0)

using Random = std::mt19937_64;

PredictorShape shape_of(int64_t n_embd) {
  // Layer 1 has no experts.
  return {4, n_embd, 12, 3, {true, false, true, true}};
}

std::vector<float> normal(Random& random, int64_t n) {
  std::normal_distribution<float> draw;
  std::vector<float> values(static_cast<size_t>(n));
  for (float& v : values) v = draw(random);
  return values;
}

void floats(StateWriter& out, const std::vector<float>& values) {
  out.bytes(values.data(), values.size() * sizeof(float));
}

void map(StateWriter& out, Random& random, int64_t rows, int64_t cols) {
  const Format& format = *find_format(FormatId::Q8_0);
  const std::vector<float> w = normal(random, rows * cols);
  std::vector<uint8_t> bytes(static_cast<size_t>(rows * row_bytes(format, cols)));
  format.quantize(w.data(), bytes.data(), rows * cols, nullptr);
  out.bytes(bytes.data(), bytes.size());
}

std::string linear_state(Random& random, const PredictorShape& s) {
  constexpr int64_t kDistances = 2;
  StateWriter out("linear", s);
  out.value(kDistances);
  for (int64_t source = 0; source < s.n_layer; ++source) {
    floats(out, std::vector<float>(static_cast<size_t>(s.n_embd), 1.0f));
    for (int64_t layer = source; layer < source + kDistances; ++layer) {
      const bool has = layer < s.n_layer && s.mixture[static_cast<size_t>(layer)];
      out.value(static_cast<int64_t>(has));
      if (!has) continue;
      floats(out, normal(random, s.n_expert));
      map(out, random, s.n_expert, map_cols(s.n_embd));
    }
  }
  return out.take();
}

std::string path_state(Random& random, const PredictorShape& s) {
  constexpr int64_t kHidden = 64;
  const int64_t units = s.n_layer * s.n_expert;
  StateWriter out("path", s);
  out.value(kHidden);
  floats(out, std::vector<float>(static_cast<size_t>(s.n_embd), 1.0f));
  floats(out, normal(random, kHidden));
  map(out, random, kHidden, map_cols(s.n_embd));
  map(out, random, units, kHidden);
  floats(out, normal(random, units));
  map(out, random, units, kHidden);
  return out.take();
}

std::string oracle_state(Random& random, const PredictorShape& s) {
  StateWriter out("oracle", s);
  out.value(int64_t{4});
  for (int64_t tokens : {3, 1, 1, 40}) {
    out.value(tokens);
    for (int64_t i = 0; i < 3 * tokens * s.n_expert_used; ++i) {
      out.value(static_cast<uint16_t>(random() % static_cast<uint64_t>(s.n_expert)));
    }
  }
  return out.take();
}

class Hidden : public RouterProbe {
 public:
  Hidden(const float* x, int64_t n_logits) : x_(x), n_logits_(n_logits) {}
  void logits(int64_t, float* out) override { std::fill_n(out, n_logits_, 0.0f); }
  const float* hidden() const override { return x_; }

 private:
  const float* x_;
  int64_t n_logits_;
};

// A forward pass; guesses of all layers, in the order of layers.
std::vector<Guess> forward_pass(Predictor& predictor, const PredictorShape& s, const float* x,
                                int64_t tokens, Random& random) {
  std::vector<Guess> all, guesses;
  Hidden ahead(x, tokens * s.n_expert);
  std::vector<StepRow> rows(static_cast<size_t>(tokens));
  const bool prompt = tokens > 1 && random() % 2 == 0;
  for (size_t i = 0; i < rows.size(); ++i) rows[i].sequence = prompt ? 0 : static_cast<int64_t>(i);
  predictor.begin({prompt ? Phase::kPrompt : Phase::kDecode, rows});
  for (int64_t layer = -1; layer < s.n_layer; ++layer) {
    if (layer >= 0) {
      if (!s.mixture[static_cast<size_t>(layer)]) continue;
      Routes routes;
      for (int64_t i = 0; i < tokens; ++i) {
        const int32_t first = static_cast<int32_t>(random() % static_cast<uint64_t>(s.n_expert));
        for (int64_t j = 0; j < s.n_expert_used; ++j) {
          routes.expert.push_back(static_cast<int32_t>((first + j) % s.n_expert));
        }
      }
      routes.weight.assign(routes.expert.size(), 0.5f);
      predictor.observe(layer, routes);
    }
    const size_t n = predictor.predict(layer, 1, s.n_expert_used, ahead, guesses);
    for (size_t g = 0; g < n; ++g) {
      CHECK(guesses[g].layer > layer && guesses[g].layer < s.n_layer);
      CHECK(guesses[g].experts.size() == guesses[g].score.size());
      for (int32_t e : guesses[g].experts) CHECK(e >= 0 && e < s.n_expert);
      all.push_back(guesses[g]);
    }
  }
  return all;
}

// What is guessed for a chunk is what is guessed for its tokens, whatever its length.
void test_chunks(const char* name, const std::string& state, const PredictorShape& s) {
  Random random(1);
  constexpr int64_t kMost = 70;  // more than two batches of a map
  const std::vector<float> x = normal(random, kMost * s.n_embd);
  for (int64_t tokens : {2, 31, 32, 33, 70}) {
    const auto predictor = make_predictor(name, s);
    predictor->set_state(state);
    const std::vector<Guess> chunk = forward_pass(*predictor, s, x.data(), tokens, random);
    CHECK(chunk.size() >= 2);
    std::vector<std::set<int32_t>> single(chunk.size());
    for (int64_t i = 0; i < tokens; ++i) {
      const auto alone = make_predictor(name, s);  // with no token before
      alone->set_state(state);
      const std::vector<Guess> guesses =
          forward_pass(*alone, s, x.data() + i * s.n_embd, 1, random);
      CHECK(guesses.size() == chunk.size());
      for (size_t g = 0; g < chunk.size(); ++g) {
        CHECK(guesses[g].layer == chunk[g].layer);
        CHECK(guesses[g].experts.size() == static_cast<size_t>(s.n_expert_used));
        single[g].insert(guesses[g].experts.begin(), guesses[g].experts.end());
      }
    }
    for (size_t g = 0; g < chunk.size(); ++g) {
      CHECK(std::set<int32_t>(chunk[g].experts.begin(), chunk[g].experts.end()) == single[g]);
    }
  }
}

void test_damaged(const char* name, const std::string& state, const PredictorShape& s) {
  Random random(2);
  const std::vector<float> x = normal(random, 40 * s.n_embd);
  int refused = 0, taken = 0;
  for (int round = 0; round < 600; ++round) {
    std::string bytes = state;
    const size_t within = round % 2 ? bytes.size() : std::min<size_t>(bytes.size(), 96);
    for (int i = 0; i < 1 + round % 3; ++i) bytes[random() % within] = static_cast<char>(random());
    if (round % 7 == 0) bytes.resize(random() % (bytes.size() + 1));
    const auto predictor = make_predictor(name, s);
    try {
      predictor->set_state(bytes);
      ++taken;
    } catch (const Error& error) {
      CHECK(error.kind() == ErrorKind::kOption);
      ++refused;
      continue;
    }
    forward_pass(*predictor, s, x.data(), 3, random);
    forward_pass(*predictor, s, x.data(), 1, random);
    forward_pass(*predictor, s, x.data(), 40, random);
    if (!bytes.empty()) CHECK(predictor->state().size() == bytes.size());
  }
  std::printf("%s: %d refused, %d taken\n", name, refused, taken);
  CHECK(refused > 50 && taken > 5);
}

class Noise : public RouterProbe {
 public:
  Noise(Random& random, int64_t n_expert) : random_(random), n_expert_(n_expert) {}
  void logits(int64_t, float* out) override {
    const std::vector<float> drawn = normal(random_, n_expert_);
    std::copy(drawn.begin(), drawn.end(), out);
  }
  const float* hidden() const override { return nullptr; }

 private:
  Random& random_;
  const int64_t n_expert_;
};

// A text that repeats itself: what is remembered of each token is what it took the last time, told
// apart from what the routers say, whose guesses use the same storage.
void test_history(const PredictorShape& s) {
  constexpr int64_t kPeriod = 5;
  Random random(3);
  TokenHistory history(s.n_layer, s.n_expert_used);
  const auto predictor = make_predictor("history", s);
  predictor->set_state({});
  predictor->follow(&history);
  std::vector<std::vector<std::vector<int32_t>>> taken;  // [token][n_layer], layer 1: empty
  std::vector<Guess> guesses;
  int now = 0, next = 0, routers = 0;
  for (int64_t i = 0; i < 60; ++i) {
    const StepRow row[] = {{7, static_cast<int32_t>(100 + i % kPeriod)}};
    history.begin({Phase::kDecode, row});
    predictor->begin({Phase::kDecode, row});
    taken.emplace_back(static_cast<size_t>(s.n_layer));
    for (int64_t layer = -1; layer < s.n_layer; ++layer) {
      if (layer >= 0) {
        if (!s.mixture[static_cast<size_t>(layer)]) continue;
        Routes routes;
        const int32_t first = static_cast<int32_t>(random() % static_cast<uint64_t>(s.n_expert));
        for (int64_t j = 0; j < s.n_expert_used; ++j) {
          routes.expert.push_back(static_cast<int32_t>((first + j) % s.n_expert));
        }
        routes.weight.assign(routes.expert.size(), 0.5f);
        taken.back()[static_cast<size_t>(layer)] = routes.expert;
        history.take(layer, routes);
        predictor->observe(layer, routes);
      }
      Noise ahead(random, s.n_expert);
      const size_t n = predictor->predict(layer, 2, 2 * s.n_expert_used, ahead, guesses);
      for (size_t g = 0; g < n; ++g) {
        const Guess& guess = guesses[g];
        CHECK(guess.experts.size() == guess.score.size());
        if (!guess.remembered) {
          CHECK(guess.layer > layer && guess.layer <= layer + 2 && guess.layer < s.n_layer);
          ++routers;
          continue;
        }
        CHECK(i >= kPeriod);
        const bool of_next = guess.layer >= s.n_layer;
        CHECK(of_next ? guess.layer == s.n_layer + layer : layer < 0);
        const auto& then = taken[static_cast<size_t>(i - kPeriod + of_next)];
        CHECK(guess.experts == then[static_cast<size_t>(guess.layer % s.n_layer)]);
        for (float score : guess.score) {
          CHECK(score == static_cast<float>(history.bin()));
          CHECK(score >= 0 && score < TokenHistory::kBins);
        }
        ++(of_next ? next : now);
      }
    }
  }
  // Three layers with experts; each token but the first ones was foretold, and its next.
  CHECK(now == 3 * (60 - kPeriod) && next == 3 * (60 - kPeriod));
  CHECK(routers > 0);
}

}  // namespace

int main() {
  test_history(shape_of(32));
  for (int64_t n_embd : {32, 50}) {
    const PredictorShape s = shape_of(n_embd);
    Random random(static_cast<uint64_t>(n_embd));
    const std::string linear = linear_state(random, s), path = path_state(random, s);
    test_chunks("linear", linear, s);
    test_chunks("path", path, s);
    test_damaged("linear", linear, s);
    test_damaged("path", path, s);
    test_damaged("oracle", oracle_state(random, s), s);
    const auto transition = make_predictor("transition", s);
    transition->set_state({});
    const std::vector<float> x = normal(random, 40 * n_embd);
    for (int i = 0; i < 50; ++i) forward_pass(*transition, s, x.data(), 1 + i % 40, random);
    test_damaged("transition", transition->state(), s);
  }
  std::puts("predict_test: passed");
  return 0;
}
