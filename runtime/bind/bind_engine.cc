// Engine and Sequence for Python (runtime/_core.pyi). The GIL is released around everything that
// computes or reads; a long evaluation takes it every 20 ms to see Ctrl-C.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "runtime/bind/bind.h"
#include "runtime/bind/engine_options.h"
#include "runtime/base/errors.h"
#include "runtime/core/decode.h"
#include "runtime/core/sequence.h"
#include "runtime/bind/unlocked.h"

namespace nb = nanobind;
using stoker::Engine;
using stoker::Error;
using stoker::ErrorKind;
using stoker::Sequence;

namespace {

// Returns tokens from a list or an integer array of one dimension.
std::vector<int32_t> to_tokens(nb::handle object) {
  std::vector<int32_t> tokens;
  nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> array;
  if (nb::try_cast(object, array, false)) {
    tokens.assign(array.data(), array.data() + array.shape(0));
    return tokens;
  }
  for (nb::handle item : nb::borrow<nb::iterable>(object)) {
    const long long value = nb::cast<long long>(nb::int_(item));
    if (value < INT32_MIN || value > INT32_MAX) {
      throw Error(ErrorKind::kOption,
                  "token: expected a 32-bit integer, found " + std::to_string(value));
    }
    tokens.push_back(static_cast<int32_t>(value));
  }
  return tokens;
}

// Returns an array that owns its memory, filled by f without the GIL.
template <class T, class F>
nb::object filled(std::initializer_list<size_t> shape, F&& f) {
  size_t n = 1;
  for (size_t s : shape) n *= s;
  auto* data = new T[n > 0 ? n : 1];
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  {
    const stoker::Unlocked unlocked;
    f(data);
  }
  return nb::cast(nb::ndarray<nb::numpy, T>(data, shape, owner));
}

nb::object copy_of(const std::vector<float>& v) {
  return filled<float>({v.size()}, [&](float* out) { std::copy(v.begin(), v.end(), out); });
}

void poll_signals() {
  const stoker::Relocked relocked;
  if (PyErr_CheckSignals() != 0) throw nb::python_error();
}

nb::dict to_dict(const stoker::ModelConfig& c, int64_t context) {
  nb::dict d;
  d["architecture"] = decoded(c.architecture);
  d["name"] = decoded(c.name);
  d["n_layer"] = c.n_layer;
  d["n_embd"] = c.n_embd;
  d["n_vocab"] = c.n_vocab;
  d["n_head"] = c.n_head;
  d["n_head_kv"] = c.n_head_kv;
  d["head_dim"] = c.head_dim;
  d["n_ff"] = c.n_ff;
  d["n_expert"] = c.n_expert;
  d["n_expert_used"] = c.n_expert_used;
  d["n_ff_expert"] = c.n_ff_expert;
  d["sliding_window"] = c.sliding_window;
  d["causal"] = c.causal;
  d["routes_early"] = c.routing.where == stoker::Routing::Where::kLayerInput;
  d["pregated"] = c.routing.pregated;
  d["gating"] = stoker::kGatingNames[static_cast<int>(c.routing.gating)];
  d["context_train"] = c.context_train;
  d["context"] = context;
  return d;
}

nb::list to_list(const std::vector<stoker::OpCost>& work) {
  constexpr const char* kParts[] = {"layers", "experts", "output"};
  nb::list list;
  for (const stoker::OpCost& w : work) {
    nb::dict d;
    d["part"] = kParts[static_cast<int>(w.part)];
    d["format"] = w.format->name;
    d["balanced"] = w.balanced;
    d["products"] = w.products;
    d["weights"] = w.weights;
    d["bytes"] = w.bytes;
    list.append(d);
  }
  return list;
}

nb::dict to_dict(const stoker::Plan& p, stoker::KvType kv_type, stoker::Precision precision) {
  nb::dict d;
  d["isa"] = stoker::isa_name(p.isa);
  d["threads"] = p.threads;
  d["context"] = p.context;
  d["chunk"] = p.chunk;
  d["kv_type"] = stoker::kKvTypeNames[static_cast<int>(kv_type)];
  d["precision"] = stoker::kPrecisionNames[static_cast<int>(precision)];
  d["weight_bytes"] = p.weight_bytes;
  d["kv_bytes"] = p.kv_bytes;
  d["kv_lent_bytes"] = p.kv_lent_bytes;
  d["scratch_bytes"] = p.scratch_bytes;
  d["token_bytes"] = p.token_bytes;
  d["layer_macs"] = p.layer_macs;
  d["streamed_bytes"] = p.streamed_bytes;
  d["least_memory"] = p.least_memory;
  d["work"] = to_list(p.work);
  nb::dict kinds;
  for (int i = 0; i < stoker::kTensorKinds; ++i) {
    const int64_t bytes = p.bytes_by_kind[static_cast<size_t>(i)];
    if (bytes > 0) kinds[stoker::tensor_kind_name(static_cast<stoker::TensorKind>(i))] = bytes;
  }
  d["kinds"] = kinds;
  const stoker::MemoryPlan& m = p.memory;
  d["memory"] = m.budget;
  if (m.budget == 0) return d;
  d["process_bytes"] = m.process;
  d["ring_bytes"] = m.ring;
  d["margin_bytes"] = m.margin;
  d["slot_bytes"] = m.slot_bytes;
  d["expert_bytes"] = m.expert_bytes;
  d["slots"] = m.n_slots;
  d["experts"] = m.n_units;
  d["working_set"] = m.working_set;
  d["streams"] = m.streams();
  return d;
}

nb::dict config_of(const Engine& e) { return to_dict(e.config(), e.plan().context); }

nb::dict plan_of(const Engine& e) { return to_dict(e.plan(), e.kv_type(), e.precision()); }

// Returns what an Engine of these options would have as config and plan, from the header alone.
nb::tuple plan_without_load(const stoker::GgufFile& file, const nb::kwargs& given) {
  const stoker::EngineOptions options = engine_options(given);
  stoker::LoadPlan load;
  {
    const stoker::Unlocked unlocked;
    load = stoker::plan_load(file, options);
  }
  return nb::make_tuple(to_dict(load.config, load.plan.context),
                        to_dict(load.plan, options.kv_type, options.precision));
}

// The engine is not destroyed in a process that was forked since: its destructor would wait for
// threads that do not exist there.
std::shared_ptr<Engine> shared(std::unique_ptr<Engine> engine) {
  return std::shared_ptr<Engine>(engine.release(), [](Engine* e) {
    if (e->pool().process().here()) delete e;
  });
}

#define STOKER_ITEM(type, name) d[#name] = counters.name;
nb::dict to_dict(const stoker::StoreCounters& counters) {
  nb::dict d;
  STOKER_STORE_COUNTERS(STOKER_ITEM)
  return d;
}

nb::dict to_dict(const stoker::StreamCounters& counters) {
  nb::dict d;
  STOKER_STREAM_COUNTERS(STOKER_ITEM)
  return d;
}
#undef STOKER_ITEM

// Returns the counters of the expert store since the load; None if every expert is resident.
nb::object offload_of(const Engine& e) {
  const stoker::FlashExperts* flash = e.flash();
  if (!flash) return nb::none();
  e.pool().process().require();
  const stoker::StoreStatistics s = flash->statistics();
  const stoker::IoStatistics io = flash->reader().io().statistics();
  nb::dict d = to_dict(static_cast<const stoker::StoreCounters&>(s));
  d["layer_uses"] = nb::cast(s.layer_uses);
  d["layer_hits"] = nb::cast(s.layer_hits);
  d["read_bytes"] = io.bytes;
  d["read_s"] = io.busy_s;
  d["io"] = flash->reader().io().description();
  d["prefetch"] = flash->prefetch_description();
  return d;
}

// Returns the counters of the streamed weights since the load; None if there are none.
nb::object stream_of(const Engine& e) {
  const stoker::WeightStream* stream = e.stream();
  if (!stream) return nb::none();
  e.pool().process().require();
  const stoker::IoStatistics io = stream->reader().io().statistics();
  nb::dict d = to_dict(stream->statistics());
  d["read_bytes"] = io.bytes;
  d["read_s"] = io.busy_s;
  d["io"] = stream->reader().io().description();
  return d;
}

// Calls f with the store under the pool's lease, between evaluations. Throws if there is none.
template <class F>
void with_flash(const Engine& e, F&& f) {
  stoker::FlashExperts* flash = e.flash();
  if (!flash) throw Error(ErrorKind::kOption, "every expert of this model is resident");
  const stoker::Unlocked unlocked;
  const stoker::ThreadPool::Lease lease(e.pool());
  f(*flash);
}

void record_routing(const Engine& e, bool on) {
  with_flash(e, [&](stoker::FlashExperts& flash) { flash.record(on); });
}

void empty_cache(const Engine& e) {
  with_flash(e, [](stoker::FlashExperts& flash) { flash.forget(); });
}

double flash_bandwidth(const Engine& e, int64_t nbytes, uint64_t seed) {
  double bandwidth = 0;
  if (!e.flash() && e.stream()) {
    const stoker::Unlocked unlocked;
    const stoker::ThreadPool::Lease lease(e.pool());
    return e.stream()->flash_bandwidth(nbytes, seed);
  }
  with_flash(e, [&](stoker::FlashExperts& f) { bandwidth = f.flash_bandwidth(nbytes, seed); });
  return bandwidth;
}

// Returns what the predictor has learnt.
nb::bytes predictor_state(const Engine& e) {
  std::string state;
  with_flash(e, [&](stoker::FlashExperts& flash) {
    if (flash.predictor()) state = flash.predictor()->state();
  });
  return nb::bytes(state.data(), state.size());
}

// Returns columns of what was recorded since the last call, each an array [n].
nb::dict take_routing(const Engine& e) {
  std::vector<stoker::Access> trace;
  with_flash(e, [&](stoker::FlashExperts& flash) { trace = flash.take_trace(); });
  const auto column = [&](auto value) {
    using T = decltype(value(trace[0]));
    return filled<T>({trace.size()}, [&](T* out) {
      for (size_t i = 0; i < trace.size(); ++i) out[i] = value(trace[i]);
    });
  };
  nb::dict d;
  d["evaluation"] = column([](const stoker::Access& a) { return a.evaluation; });
  d["phase"] = column([](const stoker::Access& a) { return static_cast<uint8_t>(a.phase); });
  d["tokens"] = column([](const stoker::Access& a) { return a.tokens; });
  d["token"] = column([](const stoker::Access& a) { return a.token; });
  d["id"] = column([](const stoker::Access& a) { return a.id; });
  d["sequence"] = column([](const stoker::Access& a) { return a.sequence; });
  d["layer"] = column([](const stoker::Access& a) { return a.layer; });
  d["rank"] = column([](const stoker::Access& a) { return a.rank; });
  d["expert"] = column([](const stoker::Access& a) { return a.expert; });
  d["weight"] = column([](const stoker::Access& a) { return a.weight; });
  d["source"] = column([](const stoker::Access& a) { return a.source; });
  d["wait_us"] = column([](const stoker::Access& a) { return a.wait_us; });
  return d;
}

nb::object copy_or_none(const std::vector<float>& v) {
  return v.empty() ? nb::object(nb::none()) : copy_of(v);
}

// Returns for each layer the router [n_expert, n_embd], the norm of its input [n_embd] (None: it
// reads the residual stream itself) and the bias of its gates for the choice [n_expert] (None:
// there is none); None for a layer without a router.
nb::list routers(const Engine& e) {
  const stoker::ModelConfig& c = e.config();
  nb::list list;
  for (const stoker::LayerWeights& w : e.weights().layers) {
    const stoker::Matrix& m = w.router;
    if (!m) {
      list.append(nb::none());
      continue;
    }
    const auto rows = static_cast<size_t>(m.rows), cols = static_cast<size_t>(m.cols);
    nb::object matrix = filled<float>({rows, cols}, [&](float* out) {
      for (int64_t r = 0; r < m.rows; ++r) {
        m.format->dequantize(m.data + r * m.stride, out + r * m.cols, m.cols);
      }
    });
    const bool reads_norm = c.routing.where == stoker::Routing::Where::kFeedForward;
    list.append(nb::make_tuple(matrix, reads_norm ? copy_of(w.ffn_norm) : nb::object(nb::none()),
                               copy_or_none(w.router_bias)));
  }
  return list;
}

nb::dict stats_of(const Sequence& t) {
  const stoker::SequenceStats& s = t.stats();
  nb::dict d;
  d["prompt_tokens"] = s.prompt_tokens;
  d["prompt_seconds"] = s.prompt_seconds;
  d["decode_tokens"] = s.decode_tokens;
  d["decode_seconds"] = s.decode_seconds;
  d["decode_bytes"] = s.decode_bytes;
  const Engine& e = t.engine();
  d["experts"] = e.flash() ? nb::object(to_dict(s.experts)) : nb::object(nb::none());
  d["stream"] = e.stream() ? nb::object(to_dict(s.stream)) : nb::object(nb::none());
  return d;
}

stoker::Phase to_phase(const std::string& name) {
  for (const stoker::Phase phase :
       {stoker::Phase::kPrompt, stoker::Phase::kDecode, stoker::Phase::kVerify}) {
    if (name == stoker::kPhaseNames[static_cast<int>(phase)]) return phase;
  }
  throw Error(ErrorKind::kOption, "phase: expected prompt, decode or verify, found " + name);
}

// Evaluates rows (sequence, token) of several sequences, each at its sequence's position, and has
// the sequences keep the logits of their last ones; all_logits: returns those of every row, too.
nb::object eval_rows(const Engine& e, const nb::list& given, const std::string& phase,
                     bool all_logits) {
  std::vector<stoker::Row> rows;
  std::map<Sequence*, size_t> last;
  for (nb::handle item : given) {
    const auto pair = nb::cast<nb::tuple>(item);
    if (pair.size() != 2) throw nb::type_error("rows: expected (sequence, token) pairs");
    auto* sequence = nb::cast<Sequence*>(pair[0]);
    const std::vector<int32_t> token = to_tokens(nb::make_tuple(pair[1]));
    const auto found = last.find(sequence);
    const int64_t position =
        found == last.end() ? sequence->position() : rows[found->second].position + 1;
    last[sequence] = rows.size();
    rows.push_back(
        {sequence, token[0], position, all_logits ? stoker::kWantLogits : stoker::kWantNothing});
  }
  for (const auto& [sequence, row] : last) rows[row].want |= stoker::kWantKept;
  const stoker::Phase which = to_phase(phase);
  if (!all_logits) {
    const stoker::Unlocked unlocked;
    e.eval(rows, which, {}, poll_signals);
    return nb::none();
  }
  return filled<float>({rows.size(), static_cast<size_t>(e.config().n_vocab)},
                       [&](float* out) { e.eval(rows, which, {.logits = out}, poll_signals); });
}

// Makes a step of generation of several sequences: (sequence, token, sampler) each. Returns the
// tokens chosen; None if the sampler could not choose.
nb::list decode_steps(const Engine& e, const nb::list& given) {
  std::vector<stoker::DecodeStep> steps;
  for (nb::handle item : given) {
    const auto step = nb::cast<nb::tuple>(item);
    if (step.size() != 3) throw nb::type_error("expected (sequence, token, sampler)");
    steps.push_back({nb::cast<Sequence*>(step[0]), nb::cast<int32_t>(step[1]),
                     nb::cast<stoker::Sampler*>(step[2])});
  }
  {
    const stoker::Unlocked unlocked;
    stoker::decode(e, steps, poll_signals);
  }
  nb::list tokens;
  for (const stoker::DecodeStep& s : steps) {
    tokens.append(s.next < 0 ? nb::object(nb::none()) : nb::object(nb::int_(s.next)));
  }
  return tokens;
}

// Returns -ln p(target) after each row (sequence, token, target); the sequences keep no logits.
nb::object score_rows(const Engine& e, const nb::list& given) {
  std::vector<stoker::Row> rows;
  std::map<Sequence*, int64_t> next;
  for (nb::handle item : given) {
    const auto row = nb::cast<nb::tuple>(item);
    if (row.size() != 3) throw nb::type_error("rows: expected (sequence, token, target)");
    auto* sequence = nb::cast<Sequence*>(row[0]);
    const auto position = next.try_emplace(sequence, sequence->position()).first;
    rows.push_back({sequence, nb::cast<int32_t>(row[1]), position->second++, stoker::kWantNll,
                    nb::cast<int32_t>(row[2])});
  }
  return filled<double>({rows.size()}, [&](double* out) {
    e.eval(rows, stoker::Phase::kPrompt, {.nll = out}, poll_signals);
  });
}

}  // namespace

void bind_engine(nb::module_& m) {
  nb::class_<Engine>(m, "Engine")
      .def(nb::new_([](std::shared_ptr<const stoker::GgufFile> file, const nb::kwargs& given) {
             const stoker::EngineOptions options = engine_options(given);
             const stoker::Unlocked unlocked;
             return shared(std::make_unique<Engine>(std::move(file), options, poll_signals));
           }),
           nb::arg("file"), nb::arg("options"))
      .def_prop_ro("config", config_of)
      .def_prop_ro("plan", plan_of)
      .def_prop_ro("offload", offload_of)
      .def_prop_ro("stream", stream_of)
      .def_prop_ro("sessions",
                   [](const Engine& e) {
                     const Engine::Sessions s = e.sessions();
                     return nb::make_tuple(s.open, s.lent_bytes);
                   })
      .def_prop_ro("survives_fork", [](const Engine& e) { return !e.flash() && !e.stream(); })
      .def("record_routing", record_routing, nb::arg("on"))
      .def("take_routing", take_routing)
      .def("predictor_state", predictor_state)
      .def_prop_ro("routers", routers)
      .def("empty_cache", empty_cache)
      .def("eval", eval_rows, nb::arg("rows"), nb::arg("phase"), nb::arg("all_logits") = false)
      .def("decode", decode_steps, nb::arg("steps"))
      .def("score", score_rows, nb::arg("rows"))
      .def("flash_bandwidth", flash_bandwidth, nb::arg("nbytes"), nb::arg("seed") = 1)
      .def("sequence", [](std::shared_ptr<Engine> e) {
        const stoker::Unlocked unlocked;  // it may wait for another session's evaluation
        return std::make_unique<Sequence>(std::move(e), poll_signals);
      });

  m.def("architectures", [] {
    nb::list names;
    for (const stoker::NamedFamily& row : stoker::families()) {
      names.append(nb::str(row.architecture.data(), row.architecture.size()));
    }
    return names;
  });
  m.def("plan_constants", [] {
    nb::dict d;
    d["readers"] = stoker::IoOptions{}.readers;
    d["ring_reads"] = stoker::kRingReads;
    d["least_read"] = stoker::kLeastRead;
    d["most_read"] = stoker::kMostRead;
    return d;
  });
  m.def("plan", plan_without_load, nb::arg("file"), nb::arg("options"),
        "(Engine.config, Engine.plan) of a load with these options, from the header alone.");

  nb::class_<Sequence>(m, "Sequence")
      .def_prop_ro("position", &Sequence::position)
      .def_prop_ro("context", &Sequence::context)
      .def(
          "eval",
          [](Sequence& t, nb::handle tokens, const std::string& phase) {
            const std::vector<int32_t> ids = to_tokens(tokens);
            const stoker::Phase which = to_phase(phase);
            const stoker::Unlocked unlocked;
            t.eval(ids, which);
          },
          nb::arg("tokens"), nb::arg("phase") = "prompt")
      .def("decode",
           [](Sequence& t, int32_t token, stoker::Sampler& sampler) {
             const stoker::Unlocked unlocked;
             return t.decode(token, sampler);
           })
      .def("logits", [](const Sequence& t) { return copy_of(t.logits()); })
      .def("hidden", [](const Sequence& t) { return copy_of(t.hidden()); })
      .def(
          "eval_all",
          [](Sequence& t, nb::handle tokens, const std::string& phase) {
            const std::vector<int32_t> ids = to_tokens(tokens);
            const stoker::Phase which = to_phase(phase);
            const auto n_vocab = static_cast<size_t>(t.engine().config().n_vocab);
            return filled<float>({ids.size(), n_vocab},
                                 [&](float* out) { t.eval_all(ids, out, which); });
          },
          nb::arg("tokens"), nb::arg("phase") = "prompt")
      .def("eval_hidden",
           [](Sequence& t, nb::handle tokens) {
             const std::vector<int32_t> ids = to_tokens(tokens);
             const auto n_embd = static_cast<size_t>(t.engine().config().n_embd);
             return filled<float>({ids.size(), n_embd},
                                  [&](float* out) { t.eval_hidden(ids, out); });
           })
      .def("eval_taps",
           [](Sequence& t, nb::handle tokens) {
             const std::vector<int32_t> ids = to_tokens(tokens);
             const stoker::ModelConfig& c = t.engine().config();
             const auto n_layer = static_cast<size_t>(c.n_layer);
             const auto n_embd = static_cast<size_t>(c.n_embd);
             return filled<float>({n_layer, ids.size(), n_embd},
                                  [&](float* out) { t.eval_taps(ids, out); });
           })
      .def("eval_hidden_taps",
           [](Sequence& t, nb::handle tokens) {
             const std::vector<int32_t> ids = to_tokens(tokens);
             const stoker::ModelConfig& c = t.engine().config();
             const auto n_layer = static_cast<size_t>(c.n_layer);
             const size_t row = ids.size() * static_cast<size_t>(c.n_embd);
             std::vector<float> taps(n_layer * row);
             nb::object hidden = filled<float>(
                 {n_layer + 1, ids.size(), row / std::max<size_t>(ids.size(), 1)}, [&](float* out) {
                   std::fill_n(out, (n_layer + 1) * row, 0.0f);
                   t.eval_taps(ids, taps.data(), out);
                 });
             nb::object inputs =
                 filled<float>({n_layer, ids.size(), row / std::max<size_t>(ids.size(), 1)},
                               [&](float* out) { std::copy(taps.begin(), taps.end(), out); });
             return nb::make_tuple(inputs, hidden);
           })
      .def("eval_nll",
           [](Sequence& t, nb::handle tokens) {
             const std::vector<int32_t> ids = to_tokens(tokens);
             return filled<double>({ids.empty() ? 0 : ids.size() - 1},
                                   [&](double* out) { t.eval_nll(ids, out); });
           })
      .def("sample",
           [](Sequence& t, stoker::Sampler& sampler) {
             const stoker::Unlocked unlocked;
             return t.sample(sampler);
           })
      .def("step",
           [](Sequence& t, stoker::Sampler& sampler) {
             const stoker::Unlocked unlocked;
             return t.step(sampler);
           })
      .def("truncate", &Sequence::truncate)
      .def("fork", &Sequence::fork)
      .def("cancel", &Sequence::cancel)
      .def("forget_cancel", &Sequence::forget_cancel)
      .def_prop_ro("stats", stats_of);
}
