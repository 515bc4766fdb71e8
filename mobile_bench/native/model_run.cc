#include "mobile_bench/native/model_run.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "mobile_bench/native/kernel_speed.h"
#include "mobile_bench/native/device.h"
#include "mobile_bench/native/sha256.h"
#include "mobile_bench/native/system_facts.h"
#include "runtime/base/errors.h"
#include "runtime/core/sequence.h"

namespace stoker::bench {

namespace {

// Growth of stacks and allocators after the process was measured, bytes.
constexpr int64_t kGrowth = int64_t{2} << 20;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The first `n` of the given ids, repeated if there are fewer; without any, random ids that are the
// same for every run.
std::vector<int32_t> prompt_ids(const std::vector<int32_t>& given, int64_t n, int64_t n_vocab) {
  std::vector<int32_t> ids(static_cast<size_t>(n));
  std::mt19937 random(1);
  for (size_t i = 0; i < ids.size(); ++i) {
    ids[i] = given.empty() ? static_cast<int32_t>(random() % static_cast<uint64_t>(n_vocab))
                           : given[i % given.size()];
  }
  return ids;
}

double percentile(std::vector<double> values, size_t percent) {
  std::sort(values.begin(), values.end());
  return values[std::min(values.size() - 1, values.size() * percent / 100)];
}

// Drops the files from the page cache.
void drop_page_cache(const GgufFile& file) {
  for (const std::string& path : file.shards()) {
    const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) continue;
    posix_fadvise(descriptor, 0, 0, POSIX_FADV_DONTNEED);
    close(descriptor);
  }
}

// The same fields as Engine.plan in runtime/bind/bind_engine.cc.
Json plan_json(const Engine& engine) {
  const Plan& p = engine.plan();
  JsonObject o;
  o.set("isa", isa_name(p.isa)).set("threads", p.threads).set("context", p.context);
  o.set("chunk", p.chunk).set("kv_type", kKvTypeNames[static_cast<int>(engine.kv_type())]);
  o.set("precision", kPrecisionNames[static_cast<int>(engine.precision())]);
  o.set("weight_bytes", p.weight_bytes).set("kv_bytes", p.kv_bytes);
  o.set("kv_lent_bytes", p.kv_lent_bytes);
  o.set("scratch_bytes", p.scratch_bytes).set("token_bytes", p.token_bytes);
  o.set("layer_macs", p.layer_macs).set("streamed_bytes", p.streamed_bytes);
  o.set("least_memory", p.least_memory);
  std::vector<Json> work;
  for (const OpCost& w : p.work) {
    constexpr const char* kParts[] = {"layers", "experts", "output"};
    JsonObject part;
    part.set("part", kParts[static_cast<int>(w.part)]).set("format", w.format->name);
    part.set("balanced", w.balanced).set("products", w.products).set("weights", w.weights);
    work.push_back(part.set("bytes", w.bytes).json());
  }
  JsonObject kinds;
  for (int i = 0; i < kTensorKinds; ++i) {
    const int64_t bytes = p.bytes_by_kind[static_cast<size_t>(i)];
    if (bytes > 0) kinds.set(tensor_kind_name(static_cast<TensorKind>(i)), bytes);
  }
  o.set("work", work).set("kinds", kinds.json()).set("memory", p.memory.budget);
  const MemoryPlan& m = p.memory;
  if (m.budget == 0) return o.json();
  o.set("process_bytes", m.process).set("ring_bytes", m.ring).set("margin_bytes", m.margin);
  o.set("slot_bytes", m.slot_bytes);
  o.set("expert_bytes", m.expert_bytes).set("slots", m.n_slots).set("experts", m.n_units);
  o.set("working_set", m.working_set).set("streams", m.streams());
  return o.json();
}

// Seconds of a fixed piece of work, which shows whether the machine's speed stays the same.
double reference_seconds(Isa isa) {
  return kernel_speed(*find_format(FormatId::Q4_0), isa, 256, 1024, 1, 1, 0.02);
}

// The `noise` of mobile_bench/probe/noise.py: what else the machine did, and why to distrust the
// run.
Json noise_json(const CpuTime& began, const CpuTime& ended, const std::vector<double>& reference,
                const std::vector<double>& celsius) {
  constexpr double kSteal = 0.02, kBusy = 0.05, kReference = 0.15, kSlowClock = 0.8;
  const double total = ended.total - began.total;
  const bool known = began.known && total > 0;
  const double steal = known ? (ended.steal - began.steal) / total : 0;
  const double others = ended.worked - began.worked - (ended.own - began.own);
  const double busy = known ? std::fmax(0, others) / total : std::nan("");
  const double spread =
      std::fmax(reference[0], reference[1]) / std::fmin(reference[0], reference[1]) - 1;
  const double clock = clock_share();
  const int held = throttled();
  std::vector<std::string> reasons;
  if (steal > kSteal) reasons.emplace_back("the host took CPU time");
  if (busy > kBusy) reasons.emplace_back("other processes used CPU time");
  if (held == 1) reasons.emplace_back("a core's clock is held below its highest");
  if (clock < kSlowClock) reasons.emplace_back("the clocks were low");
  if (spread > kReference) reasons.emplace_back("the machine's speed changed");
  JsonObject noise;
  noise.set("steal", steal).set("busy", busy).set("throttled", held < 0 ? kNull : to_json(held));
  noise.set("clock", clock).set("reference_s", reference).set("reference_spread", spread);
  return noise.set("celsius", celsius).set("noisy", reasons).json();
}

class Measurement {
 public:
  Measurement(const Options& options, const std::shared_ptr<const GgufFile>& file, int64_t memory)
      : options_(options), file_(file), engine_options_(options.engine) {
    engine_options_.offload.memory = memory;
    if (engine_options_.context == 0) {
      const std::string architecture(file->require_string("general.architecture"));
      int64_t needs = options.decode_prompt + options.tokens;
      for (const int64_t n : options.prompts) needs = std::max(needs, n);
      const int64_t limit = file->get_int(architecture + ".context_length", needs + 1);
      engine_options_.context = std::min(needs + 1, limit);
    }
  }

  void load() {
    drop_page_cache(*file_);
    load_cold_ = load_once();
    if (!options_.load_twice) return;
    sequence_.reset();
    engine_.reset();
    load_warm_ = load_once();
  }

  void evaluate_prompts() {
    for (const int64_t n : options_.prompts) {
      if (n > engine_->plan().context) {
        notes_.push_back("prompts of " + std::to_string(n) + " tokens: the context is " +
                         std::to_string(engine_->plan().context));
        continue;
      }
      restart();
      int32_t next = 0;
      const double seconds = evaluate(n, &next);
      std::fprintf(stderr, "  prompt of %lld tokens: %.3f s, %.1f tok/s\n",
                   static_cast<long long>(n), seconds, static_cast<double>(n) / seconds);
      JsonObject prompt;
      prompt.set("tokens", n).set("ttft_s", seconds).set("tok_s", static_cast<double>(n) / seconds);
      prompts_.push_back(prompt.json());
    }
  }

  void decode() {
    const int64_t context = engine_->plan().context;
    int64_t prompt = std::min(options_.decode_prompt, context - 1);
    if (!options_.ids.empty()) {
      prompt = std::min<int64_t>(prompt, static_cast<int64_t>(options_.ids.size()));
    }
    const int64_t n = std::min(options_.tokens, context - prompt);
    restart();
    int32_t next = 0;
    evaluate(prompt, &next);
    tokens_ = {next};
    Sampler greedy(static_cast<int>(engine_->config().n_vocab), {});
    const StoreStatistics before = statistics();
    // The pages of a long prompt's chunk have been touched, so every token now does the same work.
    for (int64_t i = 0; i < n; ++i) {
      const double start = now();
      sequence_->eval({&next, 1}, Phase::kDecode);
      next = sequence_->sample(greedy);
      token_s_.push_back(now() - start);
      tokens_.push_back(next);
    }
    after_ = statistics();
    before_ = before;
  }

  double load_cold() const { return load_cold_; }
  double load_warm() const { return load_warm_; }
  const std::vector<Json>& prompts() const { return prompts_; }
  const std::vector<int32_t>& tokens() const { return tokens_; }
  const Engine& engine() const { return *engine_; }
  const std::vector<std::string>& notes() const { return notes_; }
  double tokens_per_second() const { return static_cast<double>(token_s_.size()) / seconds(); }

  Json decode_json() const {
    const auto n = static_cast<double>(token_s_.size());
    JsonObject o;
    o.set("tokens", static_cast<int64_t>(token_s_.size())).set("seconds", seconds());
    o.set("tok_s", tokens_per_second());
    JsonObject token_ms;
    token_ms.set("p50", 1e3 * percentile(token_s_, 50)).set("p95", 1e3 * percentile(token_s_, 95));
    o.set("token_ms", token_ms.set("p99", 1e3 * percentile(token_s_, 99)).json());
    o.set("token_s", token_s_);
    if (!engine_->flash() && !engine_->stream()) {
      for (const char* key : {"bytes_token", "hit_rate", "layer_hits", "stall_s", "compute_s"}) {
        o.set(key, kNull);
      }
      return o.json();
    }
    const auto hits = static_cast<double>(after_.decode_hits - before_.decode_hits);
    const double uses = hits + static_cast<double>(after_.decode_late - before_.decode_late) +
                        static_cast<double>(after_.decode_misses - before_.decode_misses);
    std::vector<double> layer_hits;
    for (size_t i = 0; i < after_.layer_uses.size(); ++i) {
      const bool known = i < before_.layer_uses.size();
      const int64_t used = after_.layer_uses[i] - (known ? before_.layer_uses[i] : 0);
      const int64_t hit = after_.layer_hits[i] - (known ? before_.layer_hits[i] : 0);
      layer_hits.push_back(used > 0 ? static_cast<double>(hit) / static_cast<double>(used) : 0);
    }
    const double stall = (after_.decode_stall_s - before_.decode_stall_s) / n;
    o.set("bytes_token", static_cast<double>(after_.decode_bytes - before_.decode_bytes) / n);
    o.set("hit_rate", uses > 0 ? to_json(hits / uses) : kNull).set("layer_hits", layer_hits);
    o.set("stall_s", stall).set("compute_s", std::fmax(0, seconds() / n - stall));
    return o.json();
  }

 private:
  double seconds() const { return std::accumulate(token_s_.begin(), token_s_.end(), 0.0); }
  // Sum of the statistics of the expert store and of the streamed weights.
  StoreStatistics statistics() const {
    StoreStatistics s = engine_->flash() ? engine_->flash()->statistics() : StoreStatistics();
    if (!engine_->stream()) return s;
    const StreamCounters passed = engine_->stream()->statistics();
    s.decode_bytes += passed.decode_bytes;
    s.decode_stall_s += passed.decode_stall_s;
    return s;
  }
  double load_once() {
    engine_options_.offload.process_bytes = resident_bytes() + kGrowth;
    const double start = now();
    engine_ = std::make_shared<Engine>(file_, engine_options_);
    sequence_ = std::make_unique<Sequence>(engine_, std::function<void()>());
    return now() - start;
  }
  // Forgets the sequence and empties the expert cache.
  void restart() {
    sequence_->truncate(0);
    if (!engine_->flash()) return;
    const ThreadPool::Lease lease(engine_->pool());
    engine_->flash()->forget();
  }
  double evaluate(int64_t n, int32_t* next) {
    const std::vector<int32_t> ids = prompt_ids(options_.ids, n, engine_->config().n_vocab);
    Sampler greedy(static_cast<int>(engine_->config().n_vocab), {});
    const double start = now();
    sequence_->eval(ids);
    *next = sequence_->sample(greedy);
    return now() - start;
  }

  const Options& options_;
  const std::shared_ptr<const GgufFile> file_;
  EngineOptions engine_options_;
  std::shared_ptr<Engine> engine_;
  std::unique_ptr<Sequence> sequence_;
  double load_cold_ = 0, load_warm_ = std::nan("");
  std::vector<Json> prompts_;
  std::vector<double> token_s_;     // [decoded]
  std::vector<int32_t> tokens_;     // the one after the prompt, then those decoded
  std::vector<std::string> notes_;  // what was left out, and why
  StoreStatistics before_, after_;
};

// The run line's fields up to `context`.
JsonObject begin_line(const Options& options, const GgufFile& file, const RunPlace& place,
                      int threads, int64_t context) {
  JsonObject changed;
  for (const auto& [name, value] : options.changed) changed.set(name.c_str(), value);
  if (options.ids.empty()) changed.set("ids", "random");
  JsonObject line;
  line.set("kind", "run").set("version", 1).set("run", place.run).set("time", utc_now());
  line.set("command", options.command).set("device", place.device);
  line.set("model", model_facts(file)).set("engine", "stoker");
  line.set("engine_version", STOKER_VERSION).set("repeat", place.repeat);
  line.set("threads", threads).set("context", context);
  line.set("memory", place.memory > 0 ? to_json(place.memory) : kNull).set("limit", kNull);
  return line.set("options", changed.json());
}

std::string budget_name(int64_t memory) {
  if (memory == 0) return "everything in memory";
  char text[48];
  std::snprintf(text, sizeof(text), "%.0f MB", static_cast<double>(memory) / 1e6);
  return text;
}

}  // namespace

Json failed_run(const Options& options, const GgufFile& file, const RunPlace& place,
                const std::string& error) {
  std::fprintf(stderr, "%s, run %d: %s\n", budget_name(place.memory).c_str(), place.repeat + 1,
               error.c_str());
  JsonObject line =
      begin_line(options, file, place, options.engine.threads, options.engine.context);
  for (const char* key : {"plan", "load_cold_s", "load_warm_s"}) line.set(key, kNull);
  line.set("prompts", std::vector<Json>()).set("decode", kNull).set("peak_bytes", 0);
  line.set("group_peak_bytes", kNull).set("energy", kNull).set("noise", Json{"{}"});
  return line.set("tokens_sha256", kNull).set("error", error).json();
}

Json measure_run(const Options& options, const std::shared_ptr<const GgufFile>& file,
                 const RunPlace& place) {
  std::fprintf(stderr, "%s, run %d\n", budget_name(place.memory).c_str(), place.repeat + 1);
  Measurement m(options, file, place.memory);
  const double heat = hottest_celsius();
  try {
    m.load();
    const CpuTime began = cpu_time();
    m.evaluate_prompts();
    const double reference = reference_seconds(m.engine().plan().isa);
    m.decode();
    const double again = reference_seconds(m.engine().plan().isa);
    const CpuTime ended = cpu_time();
    const std::string ids = to_json(m.tokens()).text;
    std::fprintf(stderr, "  load %.3f s, decode %.1f tok/s, peak %.1f MB\n  tokens %s\n",
                 m.load_cold(), m.tokens_per_second(), static_cast<double>(peak_bytes()) / 1e6,
                 ids.c_str());
    const Plan& plan = m.engine().plan();
    JsonObject line = begin_line(options, *file, place, plan.threads, plan.context);
    line.set("plan", plan_json(m.engine()));
    line.set("load_cold_s", m.load_cold()).set("load_warm_s", m.load_warm());
    line.set("prompts", m.prompts()).set("decode", m.decode_json());
    line.set("peak_bytes", peak_bytes()).set("group_peak_bytes", kNull).set("energy", kNull);
    line.set("noise", noise_json(began, ended, {reference, again}, {heat, hottest_celsius()}));
    line.set("tokens_sha256", sha256(ids)).set("error", kNull).set("token_ids", m.tokens());
    return line.set("flash", kNull).set("notes", m.notes()).json();
  } catch (const Error& error) {
    return failed_run(options, *file, place, error.what());
  }
}

}  // namespace stoker::bench
