#include "runtime/core/weights.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <new>
#include <set>

#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>
#include <unistd.h>
#define STOKER_POSIX 1
#endif

#include "runtime/base/errors.h"
#include "runtime/base/start_threads.h"

namespace stoker {

namespace {

constexpr uint64_t kReadPiece = uint64_t{4} << 20;

[[noreturn]] void fail(const std::string& path, const std::string& what) {
  throw Error(ErrorKind::kModelFile, path + ": " + what);
}

std::string shape(const GgufTensor& t) {
  std::string s = "[" + std::to_string(t.ne[0]);
  for (int i = 1; i < t.n_dims; ++i) s += ", " + std::to_string(t.ne[i]);
  return s + "]";
}

#if STOKER_POSIX
// Fills base[0, size) from the file, each thread taking the next piece. Returns an error text.
std::string read_pieces(const std::string& path, uint64_t begin, uint64_t size, uint8_t* base,
                        int threads) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return std::strerror(errno);
  std::atomic<uint64_t> next{0};
  std::atomic<int> error{0};
  std::atomic<uint64_t> short_at{UINT64_MAX};
  const auto work = [&](int) {
    for (;;) {
      const uint64_t piece = next.fetch_add(kReadPiece);
      if (piece >= size || error.load() != 0 || short_at.load() != UINT64_MAX) return;
      const uint64_t end = std::min(size, piece + kReadPiece);
      for (uint64_t done = piece; done < end;) {
        const ssize_t n = ::pread(fd, base + done, end - done, static_cast<off_t>(begin + done));
        if (n > 0) {
          done += static_cast<uint64_t>(n);
        } else if (n == 0) {
          short_at.store(begin + done);
          return;
        } else if (errno != EINTR) {
          error.store(errno);
          return;
        }
      }
    }
  };
  std::vector<std::thread> others = start_threads(threads - 1, work);
  work(0);
  join(others);
  ::close(fd);
  if (error.load() != 0) return std::string("read failed: ") + std::strerror(error.load());
  if (short_at.load() != UINT64_MAX) {
    return "expected " + std::to_string(begin + size) + " bytes, found " +
           std::to_string(short_at.load());
  }
  return "";
}
#else
std::string read_pieces(const std::string& path, uint64_t begin, uint64_t size, uint8_t* base,
                        int) {
  std::ifstream in(path, std::ios::binary);
  in.seekg(static_cast<std::streamoff>(begin));
  in.read(reinterpret_cast<char*>(base), static_cast<std::streamsize>(size));
  const auto found = static_cast<uint64_t>(in.gcount());
  if (found == size) return "";
  return "expected " + std::to_string(begin + size) + " bytes, found " +
         std::to_string(begin + found);
}
#endif

class Loader {
 public:
  Loader(const GgufFile& file, const ModelConfig& config, Weights& weights)
      : file_(file), config_(config), weights_(weights) {}

  // Null where nothing has been read (partition()).
  const uint8_t* data(const GgufTensor& t) const {
    return weights_.memory ? weights_.memory->data(t) : nullptr;
  }

  const Format& format(const GgufTensor& t) const {
    const Format* f = find_format(static_cast<FormatId>(t.type));
    if (!f) {
      std::string known;
      int count = 0;
      const Format* const* all = all_formats(&count);
      for (int i = 0; i < count; ++i) known += std::string(i ? " " : "") + all[i]->name;
      throw Error(ErrorKind::kUnsupported, file_.path() + ": tensor " + t.name +
                                               ": expected one of " + known + ", found " +
                                               gguf_tensor_type_name(t.type));
    }
    return *f;
  }

  // The tensor, marked as used; null where an optional one is absent.
  const GgufTensor* find(const std::string& name, bool required = false) const {
    const GgufTensor* t = required ? &file_.require_tensor(name) : file_.tensor(name);
    if (t) used_.insert(t);
    return t;
  }

  // A tensor that the family does not know would change what the model computes: refuse it.
  void check_all_used() const {
    for (const GgufTensor& t : file_.tensors()) check_used(t);
  }
  void check_all_used(const std::vector<const GgufTensor*>& tensors) const {
    for (const GgufTensor* t : tensors) check_used(*t);
  }

  // Matrix [rows][cols], slice `slice` of a three-dimensional tensor of `slices`.
  Matrix view(const GgufTensor& t, int64_t rows, int64_t cols, int64_t slice = 0,
              int64_t slices = 1) const {
    if (t.ne[0] != cols || t.ne[1] != rows || t.ne[2] != slices || t.ne[3] != 1) {
      std::string expected = "[" + std::to_string(cols) + ", " + std::to_string(rows);
      if (slices > 1) expected += ", " + std::to_string(slices);
      fail(file_.path(),
           "tensor " + t.name + ": expected shape " + expected + "], found " + shape(t));
    }
    const Format& f = format(t);
    if (f.act == ActKind::i8 && cols % 32 != 0) {
      throw Error(ErrorKind::kUnsupported, file_.path() + ": tensor " + t.name +
                                               ": expected rows of a multiple of 32, found " +
                                               std::to_string(cols));
    }
    Matrix m;
    m.format = &f;
    m.rows = rows;
    m.cols = cols;
    m.stride = row_bytes(f, cols);
    m.tensor = static_cast<int32_t>(&t - file_.tensors().data());
    m.slice = static_cast<int32_t>(slice);
    m.first_row = slice * rows;
    if (const uint8_t* p = data(t)) m.data = p + slice * rows * m.stride;
    return m;
  }

  Matrix matrix(const std::string& name, int64_t rows, int64_t cols, bool required = true) const {
    const GgufTensor* t = find(name, required);
    return t ? view(*t, rows, cols) : Matrix{};
  }

  Vector vector(const std::string& name, int64_t n, bool required = true) const {
    const GgufTensor* t = find(name, required);
    if (!t) return {};
    if (t->ne[0] != n || t->ne[1] != 1 || t->ne[2] != 1 || t->ne[3] != 1) {
      fail(file_.path(), "tensor " + t->name + ": expected shape [" + std::to_string(n) +
                             "], found " + shape(*t));
    }
    const Format& f = format(*t);
    Vector v(static_cast<size_t>(n));
    if (const uint8_t* p = data(*t)) f.dequantize(p, v.data(), n);
    return v;
  }

  static Matrix rows_of(const Matrix& m, int64_t begin, int64_t rows) {
    Matrix part = m;
    if (m.data) part.data += begin * m.stride;
    part.first_row += begin;
    part.rows = rows;
    return part;
  }

  LayerWeights layer(int64_t il) const {
    const ModelConfig& c = config_;
    const std::string p = "blk." + std::to_string(il) + ".";
    const int64_t q = c.n_head * c.head_dim, k = c.n_head_kv * c.head_dim;
    const int64_t v = c.n_head_kv * c.head_dim_v, o = c.n_head * c.head_dim_v;
    LayerWeights w;
    w.attn_norm = vector(p + "attn_norm.weight", c.n_embd);
    if (const Matrix qkv = matrix(p + "attn_qkv.weight", q + k + v, c.n_embd, false); qkv) {
      w.q = rows_of(qkv, 0, q);
      w.k = rows_of(qkv, q, k);
      w.v = rows_of(qkv, q + k, v);
    } else {
      w.q = matrix(p + "attn_q.weight", q, c.n_embd);
      w.k = matrix(p + "attn_k.weight", k, c.n_embd);
      w.v = matrix(p + "attn_v.weight", v, c.n_embd);
    }
    w.o = matrix(p + "attn_output.weight", c.n_embd, o);
    w.q_bias = vector(p + "attn_q.bias", q, false);
    w.k_bias = vector(p + "attn_k.bias", k, false);
    w.v_bias = vector(p + "attn_v.bias", v, false);
    w.o_bias = vector(p + "attn_output.bias", c.n_embd, false);
    if (c.qk_norm) {
      w.q_norm = vector(p + "attn_q_norm.weight", c.qk_norm_full ? q : c.head_dim);
      w.k_norm = vector(p + "attn_k_norm.weight", c.qk_norm_full ? k : c.head_dim);
    }
    w.ffn_norm = vector(p + "ffn_norm.weight", c.n_embd);
    if (c.post_norms) {
      w.post_attn_norm = vector(p + "post_attention_norm.weight", c.n_embd);
      w.post_ffn_norm = vector(p + "post_ffw_norm.weight", c.n_embd);
    }
    w.mixture = is_mixture(il);
    if (!w.mixture) {
      require_width(false);
      w.gate = matrix(p + "ffn_gate.weight", c.n_ff, c.n_embd);
      w.up = matrix(p + "ffn_up.weight", c.n_ff, c.n_embd);
      w.down = matrix(p + "ffn_down.weight", c.n_embd, c.n_ff);
      return w;
    }
    if (!c.routes_once) w.router = matrix(p + "ffn_gate_inp.weight", c.n_expert, c.n_embd);
    if (c.pregated && mixture_after(il) < c.n_layer) {
      w.pregate = matrix(p + "ffn_pregate.weight", c.n_expert, c.n_embd);
      w.pregate_bias = vector(p + "ffn_pregate.bias", c.n_expert);
    }
    if (c.n_ff_shared > 0) {
      w.shared_gate = matrix(p + "ffn_gate_shexp.weight", c.n_ff_shared, c.n_embd);
      w.shared_up = matrix(p + "ffn_up_shexp.weight", c.n_ff_shared, c.n_embd);
      w.shared_down = matrix(p + "ffn_down_shexp.weight", c.n_embd, c.n_ff_shared);
      if (c.routes_once) return w;
      // Stored as a vector [n_embd].
      w.shared_router = view(*find(p + "ffn_gate_inp_shexp.weight", true), 1, c.n_embd);
    }
    return w;
  }

  // One tensor of all experts, or (older files) one tensor an expert.
  Layout::Part expert(const std::string& prefix, const char* which, int64_t e, int64_t rows,
                      int64_t cols) const {
    const std::string joined = prefix + which + "_exps.weight";
    if (const GgufTensor* t = find(joined)) {
      return part(*t, view(*t, rows, cols, e, config_.n_expert), e);
    }
    const std::string single = prefix + which + "." + std::to_string(e) + ".weight";
    const GgufTensor* t = find(single);
    if (!t) fail(file_.path(), "expected tensor " + joined + ", found none");
    return part(*t, view(*t, rows, cols), 0);
  }

  Layout::Parts expert(int64_t il, int64_t e) const {
    const std::string p = "blk." + std::to_string(il) + ".";
    const ModelConfig& c = config_;
    require_width(true);
    return {expert(p, "ffn_gate", e, c.n_ff_expert, c.n_embd),
            expert(p, "ffn_up", e, c.n_ff_expert, c.n_embd),
            expert(p, "ffn_down", e, c.n_embd, c.n_ff_expert)};
  }

  // Tensors that nobody has asked for yet.
  std::vector<const GgufTensor*> others() const {
    std::vector<const GgufTensor*> list;
    for (const GgufTensor& t : file_.tensors()) {
      if (!used_.count(&t)) list.push_back(&t);
    }
    return list;
  }

  // The first mixture layer after `il`; n_layer: none.
  int64_t mixture_after(int64_t il) const {
    while (++il < config_.n_layer && !is_mixture(il)) {
    }
    return il;
  }

  bool is_mixture(int64_t il) const {
    if (config_.routes_once) return il > 0;
    return config_.is_mixture() &&
           (config_.routed || file_.tensor("blk." + std::to_string(il) + ".ffn_gate_inp.weight"));
  }

 private:
  // A layer's feed-forward has a width that the file names.
  void require_width(bool mixture) const {
    const ModelConfig& c = config_;
    if ((mixture ? c.n_ff_expert : c.n_ff) > 0) return;
    const std::string key =
        c.architecture + (mixture ? ".expert_feed_forward_length" : ".feed_forward_length");
    throw Error(ErrorKind::kModelFile, file_.path() + ": " + key + ": expected at least 1, found " +
                                           (file_.find(key) ? "0" : "none"));
  }
  void check_used(const GgufTensor& t) const {
    if (used_.count(&t)) return;
    throw Error(ErrorKind::kUnsupported, file_.path() + ": tensor " + t.name +
                                             ": expected none of this name in architecture " +
                                             config_.architecture + ", found " + shape(t));
  }
  static Layout::Part part(const GgufTensor& t, const Matrix& m, int64_t slice) {
    const uint64_t bytes = static_cast<uint64_t>(m.nbytes());
    return {m, {t.shard, t.offset + static_cast<uint64_t>(slice) * bytes, bytes}};
  }

  const GgufFile& file_;
  const ModelConfig& config_;
  Weights& weights_;
  mutable std::set<const GgufTensor*> used_;
};

// Adds up what one token multiplies with.
class OpCostSum {
 public:
  explicit OpCostSum(std::vector<OpCost>& work) : work_(work) {}

  void add(OpCost::Part part, const Matrix& m, bool balanced) {
    if (m) add(part, m.format, balanced, 1, m.rows * m.cols, m.nbytes());
  }

  void add_layer(const LayerWeights& w) {
    for (const Matrix* m : {&w.q, &w.k, &w.v, &w.router, &w.pregate, &w.shared_router}) {
      add(OpCost::Part::kLayers, *m, true);
    }
    for (const Matrix* m :
         {&w.o, &w.gate, &w.up, &w.down, &w.shared_gate, &w.shared_up, &w.shared_down}) {
      add(OpCost::Part::kLayers, *m, false);
    }
  }

  // Of a layer's experts a token uses `used`, each as often as any other.
  void add_experts(const Layout& layout, int64_t layer, int64_t used) {
    std::vector<OpCost> all;
    OpCostSum sum(all);
    for (int64_t e = 0; e < layout.n_expert(); ++e) {
      for (const Matrix& m : layout.matrices(layout.unit(layer, e))) {
        sum.add(OpCost::Part::kExperts, m, false);
      }
    }
    const auto share = [&](int64_t n) { return n * used / layout.n_expert(); };
    for (const OpCost& w : all) {
      add(w.part, w.format, w.balanced, share(w.products), share(w.weights), share(w.bytes));
    }
  }

 private:
  void add(OpCost::Part part, const Format* format, bool balanced, int64_t products,
           int64_t weights, int64_t bytes) {
    auto it = std::find_if(work_.begin(), work_.end(), [&](const OpCost& w) {
      return w.part == part && w.format == format && w.balanced == balanced;
    });
    if (it == work_.end()) it = work_.insert(it, OpCost{part, format, balanced});
    it->products += products;
    it->weights += weights;
    it->bytes += bytes;
  }

  std::vector<OpCost>& work_;
};

// Everything but the experts.
void load_kept(const Loader& loader, const ModelConfig& c, Weights& w) {
  w.embedding = loader.matrix("token_embd.weight", c.n_vocab, c.n_embd);
  w.output = loader.matrix("output.weight", c.n_vocab, c.n_embd, false);
  if (!w.output) w.output = w.embedding;
  w.output_norm = loader.vector("output_norm.weight", c.n_embd);
  w.output_bias = loader.vector("output.bias", c.n_vocab, false);
  w.rope_factors = loader.vector("rope_freqs.weight", c.rope.n_rot / 2, false);
  if (c.rope.scaling == RopeScaling::kLongRope) {
    w.rope_factors_long = loader.vector("rope_factors_long.weight", c.rope.n_rot / 2);
    w.rope_factors_short = loader.vector("rope_factors_short.weight", c.rope.n_rot / 2);
  }
  if (c.routes_once) {
    w.router_norm = loader.vector("router_norm.weight", c.n_embd);
    w.router_up = loader.matrix("router_up.weight", c.n_router, c.n_embd);
    w.router_down = loader.matrix("router_down.weight", c.n_expert, c.n_router);
  }
  for (int64_t il = 0; il < c.n_layer; ++il) {
    w.layers.push_back(loader.layer(il));
  }
}

// Where a shard's first tensor begins; its end where it has none.
uint64_t data_begin(const GgufFile& file, size_t shard) {
  uint64_t begin = file.shard_nbytes()[shard];
  for (const GgufTensor& t : file.tensors()) {
    if (t.shard == static_cast<int>(shard)) begin = std::min(begin, t.offset);
  }
  return begin;
}

Extent extent_of(const GgufTensor& t) { return {t.shard, t.offset, t.nbytes}; }

// Below this a matrix is not worth a read of its own.
constexpr int64_t kLeastStreamed = 64 * 1024;

StreamTensor stream_tensor(const GgufFile& file, const Matrix& m) {
  const GgufTensor& t = file.tensors()[static_cast<size_t>(m.tensor)];
  return {m.tensor, t.ne[1], extent_of(t)};
}

// The matrices that a forward pass uses, in the order of use. Routers and all that is small are pinned:
// other layers look at routers ahead of time.
std::vector<StreamTensor> pass_order(const GgufFile& file, const Weights& w) {
  std::vector<StreamTensor> order;
  const auto add = [&](const Matrix& m) {
    if (!m || m.nbytes() < kLeastStreamed) return;
    if (order.empty() || order.back().tensor != m.tensor) order.push_back(stream_tensor(file, m));
  };
  for (const LayerWeights& l : w.layers) {
    for (const Matrix* m : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down, &l.shared_gate,
                            &l.shared_up, &l.shared_down}) {
      add(*m);
    }
  }
  add(w.output);
  return order;
}

}  // namespace

TensorMemory::TensorMemory(const GgufFile& file, int threads) {
  for (size_t s = 0; s < file.shards().size(); ++s) {
    const uint64_t begin = data_begin(file, s), size = file.shard_nbytes()[s] - begin;
    Shard shard{HugeMemory(size, "weights"), begin};
    if (size > 0) {
      const std::string error =
          read_pieces(file.shards()[s], begin, size, shard.memory.data(), threads);
      if (!error.empty()) fail(file.shards()[s], error);
      shard.memory.protect();
    }
    nbytes_ += static_cast<int64_t>(size);
    shards_.push_back(std::move(shard));
  }
}

int64_t TensorMemory::nbytes(const GgufFile& file) {
  uint64_t total = 0;
  for (size_t s = 0; s < file.shards().size(); ++s) {
    total += file.shard_nbytes()[s] - data_begin(file, s);
  }
  return static_cast<int64_t>(total);
}

TensorMemory::TensorMemory(const std::vector<const GgufTensor*>& tensors, FlashReader& reader,
                           const std::function<void()>& poll)
    : kept_(static_cast<uint64_t>(nbytes(tensors)), "weights"), nbytes_(nbytes(tensors)) {
  std::vector<FlashReader::Piece> pieces;
  uint8_t* at = kept_.data();
  for (const GgufTensor* t : tensors) {
    pieces.push_back({extent_of(*t), at});
    at_[t] = at + t->offset % kIoAlign;
    at += page_span(extent_of(*t));
  }
  reader.read_all(pieces, poll);
  kept_.protect();
}

int64_t TensorMemory::nbytes(const std::vector<const GgufTensor*>& tensors) {
  int64_t total = 0;
  for (const GgufTensor* t : tensors) total += page_span(extent_of(*t));
  return total;
}

const uint8_t* TensorMemory::data(const GgufTensor& t) const {
  if (!shards_.empty()) {
    const Shard& s = shards_[static_cast<size_t>(t.shard)];
    return s.memory.data() + (t.offset - s.begin);
  }
  const auto it = at_.find(&t);
  return it == at_.end() ? nullptr : it->second;
}

Weights load_weights(const GgufFile& file, const ModelConfig& c, int threads) {
  Weights w;
  // Unsupported tensors are refused before anything large is read.
  const Loader loader(file, c, w);
  for (const GgufTensor& t : file.tensors()) loader.format(t);
  w.memory = std::make_unique<TensorMemory>(file, threads);
  load_kept(loader, c, w);
  if (c.is_mixture()) {
    auto experts = std::make_unique<ResidentExperts>(c.n_layer);
    for (int64_t il = 0; il < c.n_layer; ++il) {
      for (int64_t e = 0; loader.is_mixture(il) && e < c.n_expert; ++e) {
        const Layout::Parts parts = loader.expert(il, e);
        experts->add(il, {parts[0].matrix, parts[1].matrix, parts[2].matrix});
      }
    }
    w.experts = std::move(experts);
  }
  loader.check_all_used();
  return w;
}

Partition partition(const GgufFile& file, const ModelConfig& c) {
  Weights none;
  const Loader loader(file, c, none);
  for (const GgufTensor& t : file.tensors()) loader.format(t);
  Partition p{Layout(c.n_layer, c.n_expert), {}, 0, {}, {}, {}};
  for (int64_t il = 0; il < c.n_layer; ++il) {
    if (!loader.is_mixture(il)) continue;
    for (int64_t e = 0; e < c.n_expert; ++e) p.layout.add(il, e, loader.expert(il, e));
    p.working_set += c.n_expert_used;
  }
  p.layout.finish();
  p.kept = loader.others();
  load_kept(loader, c, none);  // shapes only
  loader.check_all_used();
  OpCostSum work(p.work);
  for (int64_t il = 0; il < c.n_layer; ++il) {
    work.add_layer(none.layers[static_cast<size_t>(il)]);
    if (loader.is_mixture(il)) work.add_experts(p.layout, il, c.n_expert_used);
  }
  work.add(OpCost::Part::kLayers, none.router_up, true);
  work.add(OpCost::Part::kLayers, none.router_down, true);
  work.add(OpCost::Part::kOutput, none.output, true);
  p.pass_order = pass_order(file, none);
  p.lookup = stream_tensor(file, none.embedding);
  return p;
}

std::vector<const GgufTensor*> Partition::pinned_under(const GgufFile& file,
                                                       const StreamPlan& plan) const {
  if (!plan.active) return kept;
  std::set<int32_t> gone{lookup.tensor};
  for (const StreamTensor& t : pass_order) gone.insert(t.tensor);
  for (const int32_t t : plan.whole) gone.erase(t);
  std::vector<const GgufTensor*> list;
  for (const GgufTensor* t : kept) {
    if (!gone.count(static_cast<int32_t>(t - file.tensors().data()))) list.push_back(t);
  }
  return list;
}

Weights load_weights(const GgufFile& file, const ModelConfig& c, Partition partition,
                     StreamPlan stream, std::shared_ptr<FlashReader> reader,
                     const FlashExperts::Options& options, const std::function<void()>& poll) {
  Weights w;
  w.memory = std::make_unique<TensorMemory>(partition.pinned_under(file, stream), *reader, poll);
  Loader loader(file, c, w);
  load_kept(loader, c, w);
  loader.check_all_used(partition.kept);
  if (stream.active) {
    w.stream = std::make_unique<WeightStream>(reader, std::move(stream), partition.lookup, poll);
  }
  if (!c.is_mixture()) return w;
  PredictorShape shape{c.n_layer, c.n_embd, c.n_expert, c.n_expert_used, {}};
  for (int64_t il = 0; il < c.n_layer; ++il) shape.mixture.push_back(loader.is_mixture(il));
  auto experts = std::make_unique<FlashExperts>(std::move(partition.layout), std::move(reader),
                                                shape, options);
  w.flash = experts.get();
  w.experts = std::move(experts);
  return w;
}

}  // namespace stoker
