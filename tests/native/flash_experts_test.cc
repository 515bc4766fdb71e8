// The expert store without a model: every lease hands out the bytes of the file, whatever the
// policy, the predictor, the order and the failures of reads; nothing stays pinned.
#include "offload/flash_experts.h"

#include <algorithm>
#include <array>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "offload/pools/cache.h"
#include "offload/policy/policy.h"
#include "offload/predict/predictor.h"
#include "tests/native/io_fixture.h"
#include "tests/native/layout_fixture.h"

namespace {

using namespace io_fixture;
using layout_fixture::part;
using stoker::Cache;
using stoker::Expert;
using stoker::Extent;
using stoker::FlashExperts;
using stoker::FlashReader;
using stoker::Layout;
using stoker::Matrix;
using stoker::Phase;
using stoker::PredictorShape;
using stoker::PrefetchMode;
using stoker::Routes;
using stoker::StepRow;
using stoker::UnitId;

struct Interrupted {};

// A mixture in the test files: experts of layers 0, 2, 4 are large, of 1, 3 small; layer 5 dense;
// layer 4 in two files.
struct Mixture {
  static constexpr int64_t kLayers = 6, kExperts = 10, kUsed = 3;
  Layout layout{kLayers, kExperts};
  std::vector<std::array<Extent, 3>> extents{static_cast<size_t>(kLayers * kExperts)};
  PredictorShape shape;

  Mixture() {
    shape.n_layer = kLayers;
    shape.n_embd = 8;
    shape.n_expert = kExperts;
    shape.n_expert_used = kUsed;
    uint64_t at[] = {0, 0};
    for (int64_t l = 0; l < kLayers; ++l) {
      shape.mixture.push_back(l != 5);
      if (l == 5) continue;
      // Parts lie as in a stock file: all gates, all ups, all downs.
      const int64_t rows = l % 2 == 0 ? 41 : 13;
      for (size_t i = 0; i < 3; ++i) {
        const int32_t file = l == 4 && i == 2 ? 1 : 0;
        for (int64_t e = 0; e < kExperts; ++e) {
          const Layout::Part p = part(file, at[file], rows, 162);
          extents[static_cast<size_t>(layout.unit(l, e))][i] = p.extent;
          at[file] += p.extent.bytes;
        }
        at[file] += 70000;
      }
      for (int64_t e = 0; e < kExperts; ++e) {
        Layout::Parts parts;
        for (size_t i = 0; i < 3; ++i) {
          const Extent& x = extents[static_cast<size_t>(layout.unit(l, e))][i];
          parts[i] = part(x.shard, x.offset, rows, 162);
        }
        layout.add(l, e, parts);
      }
    }
    layout.finish();
  }
};

class FakeAhead final : public stoker::RouterProbe {
 public:
  FakeAhead(std::mt19937_64& random, int64_t tokens) : random_(random), tokens_(tokens) {
    hidden_.resize(static_cast<size_t>(tokens * 8));
    for (float& x : hidden_) x = static_cast<float>(random_() % 1000) / 1000;
  }
  // Of the layer's routes that are to come, mostly.
  void logits(int64_t layer, float* out) override {
    (void)layer;
    for (int64_t i = 0; i < tokens_ * Mixture::kExperts; ++i) {
      out[i] = static_cast<float>(random_() % 1000) / 100;
    }
  }
  const float* hidden() const override { return hidden_.data(); }

 private:
  std::mt19937_64& random_;
  int64_t tokens_;
  std::vector<float> hidden_;
};

struct Passer {
  Passer(const Files& files, const std::string& backend, int readers, const std::string& policy,
         const std::string& predictor, PrefetchMode prefetch, double share, uint64_t seed)
      : files(files), random(seed) {
    int64_t all = 0;
    for (size_t c = 0; c < mixture.layout.class_bytes().size(); ++c) {
      all += mixture.layout.class_bytes()[c] * mixture.layout.class_units()[c];
    }
    FlashExperts::Options options;
    options.slots = Cache::plan_slots(
        mixture.layout, static_cast<int64_t>(share * static_cast<double>(all)), Mixture::kUsed);
    options.policy = policy;
    options.predictor = predictor;
    options.prefetch = prefetch;
    std::vector<std::string> paths;
    std::vector<uint64_t> sizes;
    for (const auto& f : files) {
      paths.push_back(f->path());
      sizes.push_back(f->size());
    }
    auto reader =
        std::make_unique<FlashReader>(paths, sizes, stoker::IoOptions{backend, readers, true});
    store =
        std::make_unique<FlashExperts>(mixture.layout, std::move(reader), mixture.shape, options);
  }

  Routes routes(int64_t tokens) {
    Routes r;
    for (int64_t t = 0; t < tokens; ++t) {
      std::set<int32_t> chosen;
      // Some experts are liked better, as in life.
      while (static_cast<int64_t>(chosen.size()) < Mixture::kUsed) {
        const uint64_t e = random() % Mixture::kExperts;
        chosen.insert(static_cast<int32_t>(random() % 2 ? e : e / 3));
      }
      for (int32_t e : chosen) {
        r.expert.push_back(e);
        r.weight.push_back(1.0f / Mixture::kUsed);
      }
    }
    return r;
  }

  void check_bytes(UnitId u, const Expert& e, const char* when) {
    if (samples > 1 && random() % static_cast<uint64_t>(samples) != 0) return;
    const Matrix* matrices[] = {&e.gate, &e.up, &e.down};
    for (size_t i = 0; i < 3; ++i) {
      const Extent& x = mixture.extents[static_cast<size_t>(u)][i];
      if (!files[static_cast<size_t>(x.shard)]->same(matrices[i]->data, x.offset, x.bytes)) {
        check(false, std::string("wrong bytes of unit ") + std::to_string(u) + " " + when);
      }
    }
  }

  // How early the layers' experts are certain.
  enum class Certain { kNever, kAtTheLayer, kAllAtOnce };

  // One chunk through the layers. Returns false where a read failed.
  bool forward_pass(int64_t tokens, bool certain, const std::function<void()>& poll = {}) {
    return forward_pass(tokens, certain ? Certain::kAtTheLayer : Certain::kNever, poll);
  }
  bool forward_pass(int64_t tokens, Certain certain, const std::function<void()>& poll = {}) {
    try {
      // Several rows are a prompt's, or the next tokens of so many sequences.
      const bool prompt = tokens > 1 && random() % 2 == 0;
      std::vector<StepRow> rows(static_cast<size_t>(tokens));
      for (size_t i = 0; i < rows.size(); ++i) {
        rows[i] = {prompt ? 0 : static_cast<int64_t>(i), static_cast<int32_t>(random() % 4)};
      }
      store->begin({prompt ? Phase::kPrompt : Phase::kDecode, rows}, &poll);
      // One router for all layers where all are certain at once.
      const Routes once = routes(tokens);
      for (int64_t l = 0; certain == Certain::kAllAtOnce && l < Mixture::kLayers; ++l) {
        if (mixture.shape.mixture[static_cast<size_t>(l)]) store->prefetch_certain(l, once);
      }
      for (int64_t l = 0; l < Mixture::kLayers; ++l) {
        if (!mixture.shape.mixture[static_cast<size_t>(l)]) continue;
        const Routes r = certain == Certain::kAllAtOnce ? once : routes(tokens);
        if (certain == Certain::kAtTheLayer) store->prefetch_certain(l, r);
        const std::set<int32_t> distinct(r.expert.begin(), r.expert.end());
        const std::vector<int32_t> experts(distinct.begin(), distinct.end());
        const auto lease = store->acquire(l, experts, r);
        acquired += static_cast<int64_t>(experts.size());
        FakeAhead ahead(random, tokens);
        if (certain != Certain::kAllAtOnce) store->look_ahead(l, ahead);
        std::vector<int> times(experts.size());
        for (;;) {
          const std::span<const int32_t> ready = lease->next_ready();
          if (ready.empty()) break;
          for (const char* when : {"when given", "while given"}) {
            for (int32_t i : ready) {
              check_bytes(store->layout().unit(l, experts[static_cast<size_t>(i)]),
                          lease->expert(i), when);
            }
          }
          for (int32_t i : ready) ++times[static_cast<size_t>(i)];
        }
        check(std::all_of(times.begin(), times.end(), [](int n) { return n == 1; }),
              "every expert is given once");
      }
      store->end();
      return true;
    } catch (const stoker::Error& e) {
      check(e.kind() == stoker::ErrorKind::kDevice, e.what());
      check(contains(e.what(), "offset") && contains(e.what(), TestFile::folder()), e.what());
      return false;
    } catch (const Interrupted&) {
      return false;
    }
  }

  // Nothing may stay pinned or on its way.
  void check_settled(const std::string& what) {
    for (int i = 0; i < 2000; ++i) {
      store->forget();
      if (pinned() == 0) break;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    check(pinned() == 0, what + ": slots stay pinned");
    for (const Cache::Slot& s : std::as_const(*store).cache().slots()) {
      check(s.unit < 0, what + ": the cache is empty");
    }
    const stoker::StoreStatistics s = store->statistics();
    check(s.hits + s.late + s.misses <= acquired, what + ": counted once");
    check(s.prefetches_used <= s.prefetches && s.cancelled <= s.prefetches,
          what + ": no more prefetches used or cancelled than made");
  }
  int64_t pinned() const {
    int64_t n = 0;
    for (const Cache::Slot& s : std::as_const(*store).cache().slots()) n += s.pins;
    return n;
  }

  const Files& files;
  Mixture mixture;
  std::mt19937_64 random;
  std::unique_ptr<FlashExperts> store;
  int64_t acquired = 0;
  int samples = 1;  // one in so many experts is compared with the file
};

// Predictors that can do without a profile.
std::vector<std::string> predictors() {
  std::vector<std::string> names;
  const Mixture mixture;
  for (std::string_view name : stoker::predictor_names()) {
    try {
      const auto predictor = stoker::make_predictor(name, mixture.shape);
      if (predictor) predictor->set_state({});
      names.emplace_back(name);
    } catch (const stoker::Error& e) {
      check(e.kind() == stoker::ErrorKind::kOption, e.what());
    }
  }
  return names;
}

void test_every_combination(const Files& files) {
  uint64_t seed = 0;
  for (std::string_view policy : stoker::policy_names()) {
    for (const std::string& predictor : predictors()) {
      for (const double share : {0.0, 0.3, 1.0}) {
        const std::string what = std::string(policy) + ", " + predictor;
        const PrefetchMode mode = seed % 3 ? PrefetchMode::kOn : PrefetchMode::kAuto;
        Passer w(files, "null:delay=0..0.05ms,reorder,seed=" + std::to_string(seed), 3,
                 std::string(policy), predictor, mode, share, seed);
        ++seed;
        for (int i = 0; i < 24; ++i) {
          check(w.forward_pass(i % 6 == 0 ? 9 : 1, i % 2 == 1), what + ": no read fails");
        }
        const stoker::StoreStatistics s = w.store->statistics();
        check(s.hits + s.late + s.misses == w.acquired, what + ": hits, late and misses");
        check(predictor != "none" || s.prefetches == 0, what + ": demand only");
        check(share < 1 || s.evictions == 0, what + ": nothing leaves where all fits");
        check(share > 0 || s.evictions > 0, what + ": a ring evicts");
        w.check_settled(what);
      }
    }
  }
}

// All layers certain before the first: nothing is read on demand, and nothing twice, as long as
// three slots or more are there for each read under way.
void test_certain(const Files& files) {
  for (uint64_t seed = 0; seed < 24; ++seed) {
    const double share = 0.25 * static_cast<double>(seed % 4);
    const std::string what = "certain, share " + std::to_string(share);
    Passer w(files, "null:delay=0..0.3ms,reorder,seed=" + std::to_string(seed), 3,
             seed % 2 ? "lru" : "reuse", "next_gate", PrefetchMode::kOn, share, seed);
    for (int i = 0; i < 40; ++i) {
      check(w.forward_pass(i % 8 == 7 ? 9 : 1, Passer::Certain::kAllAtOnce),
            what + ": no read fails");
    }
    const stoker::StoreStatistics s = w.store->statistics();
    check(s.hits + s.late + s.misses == w.acquired, what + ": hits, late and misses");
    check(s.prefetches == s.prefetches_used + s.cancelled || share == 0, what + ": all are used");
    if (w.store->cache().n_slots() >= 12 * Mixture::kUsed) {
      check(s.decode_misses == 0, what + ": " + std::to_string(s.decode_misses) + " misses");
    }
    w.check_settled(what);
  }
}

void test_failures(const Files& files) {
  for (uint64_t seed = 0; seed < 12; ++seed) {
    const std::string script = "null:eio=0.03,short=0.03,delay=0..0.1ms,reorder,seed=";
    Passer w(files, script + std::to_string(seed), 1 + static_cast<int>(seed % 4), "reuse",
             "next_gate", PrefetchMode::kOn, seed % 2 ? 0.4 : 0.0, seed);
    int passed = 0, failed = 0;
    for (int i = 0; i < 120; ++i)
      ++(w.forward_pass(i % 5 == 0 ? 12 : 1, i % 3 == 0) ? passed : failed);
    check(passed > 0 && failed > 0, "some forward passes pass and some fail");
    w.check_settled("failures " + std::to_string(seed));
  }
}

// Reads that fail just as a lease looks at their slots.
void test_failures_as_leases_begin(const Files& files) {
  for (uint64_t seed = 0; seed < 6; ++seed) {
    Passer w(files, "null:eio=0.3,seed=" + std::to_string(seed), 4, "reuse", "next_gate",
             PrefetchMode::kOn, 0.5, seed);
    for (int i = 0; i < 400; ++i) w.forward_pass(40, true);
    w.check_settled("failures as leases begin");
  }
}

void test_interruptions(const Files& files) {
  for (uint64_t seed = 0; seed < 8; ++seed) {
    Passer w(files, "null:delay=0..0.5ms,spike=15ms@0.01,reorder,seed=" + std::to_string(seed), 2,
             "lru", seed % 2 ? "next_gate" : "none", PrefetchMode::kOn, 0.1 * double(seed % 3),
             seed);
    int polls = 0, interrupted = 0;
    const std::function<void()> poll = [&] {
      if (++polls % 3 == 0) throw Interrupted();
    };
    for (int i = 0; i < 40; ++i) {
      if (i % 2 == 0) {
        interrupted += !w.forward_pass(i % 4 == 0 ? 16 : 1, i % 3 == 0, poll);
      } else {
        check(w.forward_pass(1, false), "a forward pass after an interrupted one");
      }
    }
    check(interrupted > 0, "some forward passes were interrupted");
    w.check_settled("interruptions");
  }
}

void test_cancelled_prefetches(const Files& files) {
  // One reader, slower than the forward pass: guesses go stale before their reads begin.
  Passer w(files, "null:delay=0.01ms", 1, "lru", "next_gate", PrefetchMode::kOn, 0.4, 1);
  w.samples = 10;
  int passes = 0;
  while (w.store->statistics().cancelled < 10'000 && passes < 60'000) {
    ++passes;
    if (!w.forward_pass(2, false)) break;
  }
  check(w.store->statistics().cancelled >= 10'000,
        "ten thousand prefetches are cancelled: " +
            std::to_string(w.store->statistics().cancelled) + " in " + std::to_string(passes));
  w.check_settled("cancelled prefetches");
  std::printf("%d passes, ", passes);
}

// Destroyed with reads under way.
void test_closing(const Files& files) {
  for (uint64_t seed = 0; seed < 30; ++seed) {
    Passer w(files, "null:delay=0..3ms,seed=" + std::to_string(seed), 2, "lru", "next_gate",
             PrefetchMode::kOn, 0.3, seed);
    int polls = 0;
    w.forward_pass(8, true, [&] {
      if (++polls > static_cast<int>(seed % 3)) throw Interrupted();
    });
  }
}

// Statistics from another thread; run under TSan.
void test_watched(const Files& files) {
  Passer w(files, "null:delay=0..0.02ms", 3, "reuse", "next_gate", PrefetchMode::kAuto, 0.3, 4);
  std::atomic<bool> done{false};
  int64_t last = 0;
  bool rises = true;
  std::thread watcher([&] {
    while (!done.load()) {
      const stoker::StoreStatistics s = w.store->statistics();
      const int64_t now = s.hits + s.late + s.misses;
      rises &= now >= last;
      last = now;
      rises &= !w.store->prefetch_description().empty();
      rises &= w.store->reader().io().statistics().bytes >= 0;
    }
  });
  for (int i = 0; i < 200; ++i) w.forward_pass(1, false);
  done.store(true);
  watcher.join();
  check(rises, "counters only rise");
}

}  // namespace

int main() {
  {
    const Files files = three_files();
    const auto run = [&](const char* name, auto&& test) {
      const auto began = std::chrono::steady_clock::now();
      test();
      const std::chrono::duration<double> s = std::chrono::steady_clock::now() - began;
      std::printf("%-24s %.2f s\n", name, s.count());
    };
    run("every combination", [&] { test_every_combination(files); });
    run("certain", [&] { test_certain(files); });
    run("failures", [&] { test_failures(files); });
    run("failures as leases begin", [&] { test_failures_as_leases_begin(files); });
    run("interruptions", [&] { test_interruptions(files); });
    run("cancelled prefetches", [&] { test_cancelled_prefetches(files); });
    run("closing", [&] { test_closing(files); });
    run("watched", [&] { test_watched(files); });
  }
  return report("flash_experts_test");
}
