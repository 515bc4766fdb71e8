#include "runtime/core/model/weights.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <new>
#include <set>
#include <string_view>

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

int64_t embd(const ModelConfig& c) { return c.n_embd; }
int64_t experts(const ModelConfig& c) { return c.n_expert; }

// The tensors of pre-gated families (export/pregate.py) that choose the next mixture's experts.
constexpr LayerTensor kPregate[] = {
    {.name = "ffn_pregate.weight",
     .kind = TensorKind::kRouters,
     .rows = experts,
     .cols = embd,
     .matrix = &LayerWeights::pregate,
     .layers = TensorLayers::kMixtureBeforeAnother,
     .two_term = true},
    {.name = "ffn_pregate.bias",
     .kind = TensorKind::kRouters,
     .rows = experts,
     .vector = &LayerWeights::pregate_bias,
     .layers = TensorLayers::kMixtureBeforeAnother},
};

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
  Loader(const GgufFile& file, const ModelConfig& config, const TensorTable& table,
         Weights& weights)
      : file_(file), config_(config), table_(table), weights_(weights) {}

  // The pointer is null if nothing has been read (partition()).
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

  // Returns the tensor and marks it as used; null if an optional one is absent.
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

  // Returns the matrix [rows][cols] that is slice `slice` of a three-dimensional tensor of
  // `slices`.
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

  // Fills what the rows name of `owner`, whose tensors begin with `prefix`.
  template <class Owner>
  void fill(std::span<const TensorRow<Owner>> rows, const std::string& prefix, Owner& owner) const {
    for (const TensorRow<Owner>& row : rows) {
      const int64_t n = row.rows(config_);
      if (n == 0 || row.role == TensorRole::kExpert) continue;
      if (row.cols && row.cols(config_) == 0) continue;
      if (row.vector) {
        owner.*row.vector = vector(prefix + row.name, n, !row.optional);
        continue;
      }
      Matrix& m = owner.*row.matrix;
      const std::string joined = row.joined ? prefix + row.joined : "";
      if (const GgufTensor* t = row.joined ? find(joined) : nullptr) {
        m = rows_of(view(*t, row.joined_rows(config_), row.cols(config_)),
                    row.joined_begin(config_), n);
      } else if (const GgufTensor* t = find(prefix + row.name, !row.optional)) {
        m = view(*t, n, row.cols(config_));
      }
      m.two_term = row.two_term;
    }
  }

  LayerWeights layer(int64_t il) const {
    LayerWeights w;
    w.mixture = config_.mixture[static_cast<size_t>(il)];
    each_list(il, [&](std::span<const LayerTensor> rows) { fill(rows, prefix(il), w); });
    return w;
  }

  // The parts of an expert: its slices of the tensors of all, or (older files) tensors of its own.
  Layout::Parts expert(int64_t il, int64_t e) const {
    std::vector<Layout::Part> parts;
    each_list(il, [&](std::span<const LayerTensor> rows) {
      for (const LayerTensor& row : rows) {
        if (row.role == TensorRole::kExpert) parts.push_back(expert_part(row, il, e));
      }
    });
    Layout::Parts found{};
    if (parts.size() != found.size()) {
      fail(file_.path(), "expected experts of " + std::to_string(found.size()) +
                             " matrices, found " + std::to_string(parts.size()));
    }
    std::copy(parts.begin(), parts.end(), found.begin());
    return found;
  }

  // Calls f(row, its matrix) for every matrix of the layer except experts, in the order of use.
  template <class F>
  void each_matrix(int64_t il, const LayerWeights& w, F&& f) const {
    each_list(il, [&](std::span<const LayerTensor> rows) {
      for (const LayerTensor& row : rows) {
        if (row.matrix && w.*row.matrix) f(row, w.*row.matrix);
      }
    });
  }

  // Returns the kind of every tensor of the file; kOther: it belongs to no row.
  std::vector<TensorKind> kinds() const {
    std::unordered_map<std::string_view, TensorKind> by_name;
    std::deque<std::string> names;
    const auto add = [&](const std::string& name, TensorKind kind) {
      names.push_back(name);
      by_name.emplace(names.back(), kind);
    };
    for (const std::span<const ModelTensor> rows : table_.model) {
      for (const ModelTensor& row : rows) add(row.name, row.kind);
    }
    for (int64_t il = 0; il < config_.n_layer; ++il) {
      each_list(il, [&](std::span<const LayerTensor> rows) {
        for (const LayerTensor& row : rows) {
          add(prefix(il) + row.name, row.kind);
          if (row.joined) add(prefix(il) + row.joined, row.kind);
          if (row.role != TensorRole::kExpert || file_.tensor(prefix(il) + row.name)) continue;
          for (int64_t e = 0; e < config_.n_expert; ++e) add(single(row, il, e), row.kind);
        }
      });
    }
    std::vector<TensorKind> found;
    for (const GgufTensor& t : file_.tensors()) {
      const auto it = by_name.find(t.name);
      found.push_back(it == by_name.end() ? TensorKind::kOther : it->second);
    }
    return found;
  }

  // Tensors that nobody has asked for yet.
  std::vector<const GgufTensor*> others() const {
    std::vector<const GgufTensor*> list;
    for (const GgufTensor& t : file_.tensors()) {
      if (!used_.count(&t) && !ignored(t)) list.push_back(&t);
    }
    return list;
  }

 private:
  static std::string prefix(int64_t il) { return "blk." + std::to_string(il) + "."; }

  bool has(TensorLayers layers, int64_t il) const {
    const bool mixture = config_.mixture[static_cast<size_t>(il)];
    switch (layers) {
      case TensorLayers::kAll:
        return true;
      case TensorLayers::kDense:
        return !mixture;
      case TensorLayers::kMixture:
        return mixture;
      case TensorLayers::kMixtureBeforeAnother:
        break;
    }
    const auto later = config_.mixture.begin() + il + 1;
    return mixture && std::find(later, config_.mixture.end(), true) != config_.mixture.end();
  }

  // Calls f(rows) for runs of the layer's rows, in the table's order.
  template <class F>
  void each_list(int64_t il, F&& f) const {
    const auto some = [&](std::span<const LayerTensor> list) {
      for (size_t i = 0; i < list.size(); ++i) {
        if (has(list[i].layers, il)) f(list.subspan(i, 1));
      }
    };
    for (const std::span<const LayerTensor> list : table_.layers) some(list);
    if (config_.routing.pregated) some(kPregate);
  }

  // Turns "ffn_gate_exps.weight" into "blk.<layer>.ffn_gate.<expert>.weight".
  static std::string single(const LayerTensor& row, int64_t il, int64_t e) {
    const std::string_view name(row.name);
    return prefix(il) + std::string(name.substr(0, name.find("_exps"))) + "." + std::to_string(e) +
           ".weight";
  }

  Layout::Part expert_part(const LayerTensor& row, int64_t il, int64_t e) const {
    const int64_t rows = row.rows(config_), cols = row.cols(config_);
    if (const GgufTensor* t = find(prefix(il) + row.name)) {
      return part(*t, view(*t, rows, cols, e, config_.n_expert), e);
    }
    const GgufTensor* t = find(single(row, il, e));
    if (!t) fail(file_.path(), "expected tensor " + prefix(il) + row.name + ", found none");
    return part(*t, view(*t, rows, cols), 0);
  }

  void check_used(const GgufTensor& t) const {
    if (used_.count(&t) || ignored(t)) return;
    throw Error(ErrorKind::kUnsupported, file_.path() + ": tensor " + t.name +
                                             ": expected none of this name in architecture " +
                                             config_.architecture + ", found " + shape(t));
  }
  // Returns whether the tensor is of a layer at the file's end that the family ignores.
  bool ignored(const GgufTensor& t) const {
    for (int64_t il = config_.n_layer; il < config_.n_layer + config_.n_layer_ignored; ++il) {
      if (t.name.starts_with(prefix(il))) return true;
    }
    return false;
  }
  static Layout::Part part(const GgufTensor& t, const Matrix& m, int64_t slice) {
    const uint64_t bytes = static_cast<uint64_t>(m.nbytes());
    return {m, {t.shard, t.offset + static_cast<uint64_t>(slice) * bytes, bytes}};
  }

  const GgufFile& file_;
  const ModelConfig& config_;
  const TensorTable& table_;
  Weights& weights_;
  mutable std::set<const GgufTensor*> used_;
};

// Adds up what one token multiplies with.
class OpCostSum {
 public:
  explicit OpCostSum(std::vector<OpCost>& work) : work_(work) {}

  void add(OpCost::Part part, const Matrix& m) {
    if (m) add(part, m.format, m.two_term, 1, m.rows * m.cols, m.nbytes());
  }

  // Assumes that a token's `used` experts are any of the layer's, equally often.
  void add_experts(const Layout& layout, int64_t layer, int64_t used) {
    std::vector<OpCost> all;
    OpCostSum sum(all);
    for (int64_t e = 0; e < layout.n_expert(); ++e) {
      for (const Matrix& m : layout.matrices(layout.unit(layer, e))) {
        sum.add(OpCost::Part::kExperts, m);
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

// Returns all tensors except the experts.
void load_kept(const Loader& loader, const TensorTable& table, const ModelConfig& c, Weights& w) {
  for (const std::span<const ModelTensor> rows : table.model) {
    loader.fill(rows, "", static_cast<ModelWeights&>(w));
  }
  if (!w.output) w.output = w.embedding;
  for (int64_t il = 0; il < c.n_layer; ++il) w.layers.push_back(loader.layer(il));
}

// Returns where a shard's first tensor begins, or the shard's end if it has none.
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

// The matrices that a forward pass uses and that may be streamed, in the order of use; those that
// are small are pinned.
std::vector<StreamTensor> pass_order(const GgufFile& file, const Loader& loader, const Weights& w) {
  std::vector<StreamTensor> order;
  const auto add = [&](const Matrix& m) {
    if (!m || m.nbytes() < kLeastStreamed) return;
    if (order.empty() || order.back().tensor != m.tensor) order.push_back(stream_tensor(file, m));
  };
  for (size_t il = 0; il < w.layers.size(); ++il) {
    loader.each_matrix(static_cast<int64_t>(il), w.layers[il],
                       [&](const LayerTensor& row, const Matrix& m) {
                         if (row.role == TensorRole::kStreamed) add(m);
                       });
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

Weights load_weights(const GgufFile& file, const ModelConfig& c, const TensorTable& table,
                     int threads) {
  Weights w;
  // Unsupported tensors are refused before anything large is read.
  const Loader loader(file, c, table, w);
  for (const GgufTensor& t : file.tensors()) loader.format(t);
  w.memory = std::make_unique<TensorMemory>(file, threads);
  load_kept(loader, table, c, w);
  if (c.is_mixture()) {
    auto experts = std::make_unique<ResidentExperts>(c.n_layer);
    for (int64_t il = 0; il < c.n_layer; ++il) {
      for (int64_t e = 0; w.layers[static_cast<size_t>(il)].mixture && e < c.n_expert; ++e) {
        const Layout::Parts parts = loader.expert(il, e);
        experts->add(il, {parts[0].matrix, parts[1].matrix, parts[2].matrix});
      }
    }
    w.experts = std::move(experts);
  }
  loader.check_all_used();
  return w;
}

Partition partition(const GgufFile& file, const ModelConfig& c, const TensorTable& table) {
  Weights none;
  const Loader loader(file, c, table, none);
  for (const GgufTensor& t : file.tensors()) loader.format(t);
  Partition p{Layout(c.n_layer, c.n_expert), {}, 0, {}, {}, {}, {}};
  for (int64_t il = 0; il < c.n_layer; ++il) {
    if (!c.mixture[static_cast<size_t>(il)]) continue;
    for (int64_t e = 0; e < c.n_expert; ++e) p.layout.add(il, e, loader.expert(il, e));
    p.working_set += c.n_expert_used;
  }
  p.layout.finish();
  p.kept = loader.others();
  load_kept(loader, table, c, none);  // shapes only
  loader.check_all_used();
  OpCostSum work(p.work);
  for (int64_t il = 0; il < c.n_layer; ++il) {
    const LayerWeights& w = none.layers[static_cast<size_t>(il)];
    loader.each_matrix(
        il, w, [&](const LayerTensor&, const Matrix& m) { work.add(OpCost::Part::kLayers, m); });
    if (w.mixture) work.add_experts(p.layout, il, c.n_expert_used);
  }
  for (const std::span<const ModelTensor> rows : table.model) {
    for (const ModelTensor& row : rows) {
      if (row.matrix && row.kind == TensorKind::kRouters) {
        work.add(OpCost::Part::kLayers, none.*row.matrix);
      }
    }
  }
  work.add(OpCost::Part::kOutput, none.output);
  p.pass_order = pass_order(file, loader, none);
  p.lookup = stream_tensor(file, none.embedding);
  const std::vector<TensorKind> kinds = loader.kinds();
  for (size_t i = 0; i < kinds.size(); ++i) {
    p.bytes_by_kind[static_cast<size_t>(kinds[i])] +=
        static_cast<int64_t>(file.tensors()[i].nbytes);
  }
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

Weights load_weights(const GgufFile& file, const ModelConfig& c, const TensorTable& table,
                     Partition partition, StreamPlan stream, std::shared_ptr<FlashReader> reader,
                     const FlashExperts::Options& options, const std::function<void()>& poll) {
  Weights w;
  w.memory = std::make_unique<TensorMemory>(partition.pinned_under(file, stream), *reader, poll);
  const Loader loader(file, c, table, w);
  load_kept(loader, table, c, w);
  loader.check_all_used(partition.kept);
  if (stream.active) {
    w.stream = std::make_unique<WeightStream>(reader, std::move(stream), partition.lookup, poll);
  }
  if (!c.is_mixture()) return w;
  PredictorShape shape{c.n_layer, c.n_embd, c.n_expert, c.n_expert_used, {}};
  for (int64_t il = 0; il < c.n_layer; ++il)
    shape.mixture.push_back(c.mixture[static_cast<size_t>(il)]);
  auto experts = std::make_unique<FlashExperts>(std::move(partition.layout), std::move(reader),
                                                shape, options);
  w.flash = experts.get();
  w.experts = std::move(experts);
  return w;
}

}  // namespace stoker
