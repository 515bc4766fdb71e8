// What the history foretells, against a search by brute force, and its edges: streams, chunks, the
// ring's end.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <vector>

#include "offload/predict/token_history.h"

using stoker::Phase;
using stoker::Routes;
using stoker::StepRow;
using stoker::TokenHistory;

namespace {

#define CHECK(condition)                                                   \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (0)

constexpr int64_t kLayers = 2, kUsed = 3;

// The experts that entry number `n` of all took: no two entries are alike.
uint16_t expert(int64_t n, int64_t layer, int64_t rank) {
  return static_cast<uint16_t>((n * kLayers + layer) * kUsed + rank);
}

struct Text {
  TokenHistory history;
  int64_t n = 0;                                                        // tokens so far
  std::map<int64_t, std::vector<std::pair<int32_t, int64_t>>> streams;  // token, number

  explicit Text(int64_t size) : history(kLayers, kUsed, size) {}

  std::vector<StepRow> rows;  // of the last step

  void begin(int64_t stream, const std::vector<int32_t>& tokens) {
    rows.clear();
    for (int32_t t : tokens) {
      rows.push_back({stream, t});
      streams[stream].push_back({t, n++});
    }
    history.begin({tokens.size() == 1 ? Phase::kDecode : Phase::kPrompt, rows});
  }
  void take(const std::vector<int32_t>& tokens) {
    for (int64_t l = 0; l < kLayers; ++l) {
      Routes r;
      const int64_t first = n - static_cast<int64_t>(tokens.size());
      for (int64_t t = first; t < n; ++t) {
        for (int64_t j = 0; j < kUsed; ++j) r.expert.push_back(expert(t, l, j));
      }
      history.take(l, r);
    }
  }
  void add(int64_t stream, const std::vector<int32_t>& tokens) {
    begin(stream, tokens);
    take(tokens);
  }
  // Whether the token `ahead` is foretold to be entry number `entry`.
  bool foretells(int64_t ahead, int64_t entry) const {
    for (int64_t l = 0; l < kLayers; ++l) {
      const auto found = history.foretold(ahead, l);
      if (found.size() != kUsed) return false;
      for (int64_t j = 0; j < kUsed; ++j) {
        if (found[static_cast<size_t>(j)] != expert(entry, l, j)) return false;
      }
    }
    return true;
  }
};

void test_nothing_is_known_of_new_words() {
  Text text(64);
  text.add(1, {1, 2, 3});
  CHECK(text.history.match() == 0 && text.history.foretold(0, 0).empty());
  text.add(1, {4});
  CHECK(text.history.match() == 0 && text.history.foretold(0, 1).empty());
  CHECK(!text.history.as_foretold());
}

void test_the_longest_of_the_latest() {
  Text text(64);
  //                0  1  2  3  4  5  6  7  8  9
  text.add(1, {5, 6, 7, 8, 9, 6, 7, 1, 6, 7});
  text.begin(1, {8});  // "6 7 8" at 1..3; its predecessor 5 differs from 1
  CHECK(text.history.match() == 3);
  CHECK(text.foretells(0, 3) && text.foretells(1, 4) && text.foretells(2, 5));
  text.take({8});
  CHECK(!text.history.as_foretold());
  text.begin(1, {9});  // as it went on there
  CHECK(text.history.match() == 4 && text.history.as_foretold());
  CHECK(text.foretells(0, 4));
  text.take({9});
  text.begin(1, {7});  // another way: 7 alone, last at 9
  CHECK(text.history.match() == 1 && !text.history.as_foretold());
  CHECK(text.foretells(0, 9) && text.foretells(1, 10));
}

void test_a_loop_goes_on() {
  Text text(64);
  text.add(1, {1, 2, 3, 1, 2});
  text.begin(1, {3});
  CHECK(text.history.match() == 3);
  // 3 at 2, then 1 2 at 3 4, then the same again.
  CHECK(text.foretells(0, 2) && text.foretells(1, 3) && text.foretells(2, 4));
  CHECK(text.foretells(3, 2) && text.foretells(4, 3) && text.foretells(30, 2));
}

void test_streams_do_not_mix() {
  Text text(64);
  text.add(1, {1, 2, 3});
  text.add(2, {8, 1});
  text.add(1, {1});
  text.add(2, {2});
  CHECK(text.history.match() == 2);  // "1 2" of stream 1, not "1 1 2"
  CHECK(text.foretells(0, 1) && text.foretells(1, 2));
  // 3 was followed by 1 in stream 1, though by 8 in time.
  text.add(2, {3});
  CHECK(text.history.match() == 3 && text.history.as_foretold());
  CHECK(text.foretells(1, 5));
  // Stream 1 goes on: what was foretold was of stream 2.
  text.begin(1, {2});
  CHECK(!text.history.as_foretold());
}

void test_unfinished_walks_foretell_nothing() {
  Text text(64);
  text.begin(1, {1, 2});  // interrupted
  text.begin(1, {1});
  CHECK(text.history.match() == 1 && text.history.foretold(0, 0).empty());
}

void test_rows_of_several_streams() {
  Text text(64);
  text.add(1, {1, 2, 3, 4});                                   // 0 .. 3
  text.add(2, {7, 8, 9, 5});                                   // 4 .. 7
  text.add(1, {1});                                            // 8
  text.add(2, {7});                                            // 9
  const std::vector<StepRow> next = {{2, 8}, {1, 2}, {3, 9}};  // 10 .. 12
  text.history.begin({Phase::kDecode, next});
  CHECK(!text.history.is_single() && !text.history.as_foretold());
  CHECK(text.history.match(0) == 2 && text.history.match(1) == 2 && text.history.match(2) == 1);
  CHECK(text.history.foretold(0, 1, 0)[0] == expert(5, 1, 0));
  CHECK(text.history.foretold(1, 0, 0)[2] == expert(6, 0, 2));
  CHECK(text.history.foretold(0, 0, 1)[0] == expert(1, 0, 0));
  CHECK(text.history.foretold(1, 0, 2)[0] == expert(7, 0, 0));
  // All three go on as foretold.
  const std::vector<StepRow> then = {{1, 3}, {3, 5}, {2, 9}};
  text.history.begin({Phase::kDecode, then});
  CHECK(text.history.as_foretold());
  CHECK(text.history.match(0) == 3 && text.history.match(1) == 2 && text.history.match(2) == 3);
  // One does not.
  const std::vector<StepRow> other = {{1, 4}, {3, 1}, {2, 5}};
  text.history.begin({Phase::kDecode, other});
  CHECK(!text.history.as_foretold());
}

void test_drafts_are_not_remembered() {
  Text text(64);
  text.add(1, {1, 2, 3});
  const std::vector<StepRow> draft = {{1, 1}, {1, 2}};
  text.history.begin({Phase::kVerify, draft});
  CHECK(text.history.match(0) == 0 && text.history.token(1) == 2);
  Routes routes;
  routes.expert.assign(2 * kUsed, 5);
  text.history.take(0, routes);
  text.begin(1, {1});  // it follows the 3
  CHECK(text.history.match() == 1 && text.foretells(0, 0) && text.foretells(1, 1));
}

// Random texts of few words, in several streams, chunks of any length, and a ring that overflows,
// against all earlier entries that the ring still holds.
void test_random(uint64_t seed) {
  std::mt19937_64 random(seed);
  constexpr int64_t kSize = 50;
  Text text(kSize);
  for (int step = 0; step < 400; ++step) {
    const int64_t stream = static_cast<int64_t>(random() % 3);
    const bool chunk = random() % 8 == 0;
    std::vector<int32_t> tokens(chunk ? random() % 70 + 1 : 1);
    for (int32_t& t : tokens) t = static_cast<int32_t>(random() % 4);
    text.add(stream, tokens);
    if (tokens.size() != 1) {
      CHECK(text.history.match() == 0);
      continue;
    }
    // Brute force: the text of each stream that ends at its entries.
    const auto& now = text.streams[stream];
    int best = 0;
    int64_t at = -1;
    const auto held = [&](int64_t number) { return number >= text.n - kSize; };
    for (const auto& [other, list] : text.streams) {
      for (size_t i = 0; i < list.size(); ++i) {
        if (list[i].second == now.back().second || !held(list[i].second)) continue;
        int common = 0;
        while (common < 32 && static_cast<size_t>(common) <= i &&
               static_cast<size_t>(common) < now.size() &&
               held(list[i - static_cast<size_t>(common)].second) &&
               held(now[now.size() - 1 - static_cast<size_t>(common)].second) &&
               list[i - static_cast<size_t>(common)].first ==
                   now[now.size() - 1 - static_cast<size_t>(common)].first) {
          ++common;
        }
        if (common > best || (common == best && common > 0 && list[i].second > at)) {
          best = common;
          at = list[i].second;
        }
      }
    }
    CHECK(text.history.match() == best);
    if (best > 0) CHECK(text.foretells(0, at));
  }
}

}  // namespace

int main() {
  test_nothing_is_known_of_new_words();
  test_the_longest_of_the_latest();
  test_a_loop_goes_on();
  test_streams_do_not_mix();
  test_unfinished_walks_foretell_nothing();
  test_rows_of_several_streams();
  test_drafts_are_not_remembered();
  for (uint64_t seed = 1; seed <= 20; ++seed) test_random(seed);
  std::puts("ok");
}
