#include "runtime/core/weights.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <new>
#include <set>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#define STOKER_POSIX 1
#endif

#include "runtime/core/errors.h"

namespace stoker {

namespace {

constexpr uint64_t kReadPiece = uint64_t{4} << 20;
constexpr uint64_t kHugePage = uint64_t{2} << 20;

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
  auto work = [&] {
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
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work);
  work();
  for (auto& t : others) t.join();
  ::close(fd);
  if (error.load() != 0) return std::string("read failed: ") + std::strerror(error.load());
  if (short_at.load() != UINT64_MAX) {
    return "expected " + std::to_string(begin + size) + " bytes, found " +
           std::to_string(short_at.load());
  }
  return "";
}
#endif

class Loader {
 public:
  Loader(const GgufFile& file, const ModelConfig& config, Weights& weights)
      : file_(file), config_(config), weights_(weights) {}

  const uint8_t* data(const GgufTensor& t) const {
    return weights_.shards[static_cast<size_t>(t.shard)]->at(t.offset);
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
    for (const GgufTensor& t : file_.tensors()) {
      if (used_.count(&t)) continue;
      throw Error(ErrorKind::kUnsupported, file_.path() + ": tensor " + t.name +
                                               ": expected none of this name in architecture " +
                                               config_.architecture + ", found " + shape(t));
    }
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
    m.data = data(t) + slice * rows * m.stride;
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
    Vector v(static_cast<size_t>(n));
    format(*t).dequantize(data(*t), v.data(), n);
    return v;
  }

  static Matrix rows_of(const Matrix& m, int64_t begin, int64_t rows) {
    Matrix part = m;
    part.data += begin * m.stride;
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
    if (!c.routed && (!c.is_mixture() || !file_.tensor(p + "ffn_gate_inp.weight"))) {
      w.gate = matrix(p + "ffn_gate.weight", c.n_ff, c.n_embd);
      w.up = matrix(p + "ffn_up.weight", c.n_ff, c.n_embd);
      w.down = matrix(p + "ffn_down.weight", c.n_embd, c.n_ff);
      return w;
    }
    w.router = matrix(p + "ffn_gate_inp.weight", c.n_expert, c.n_embd);
    if (c.n_ff_shared > 0) {
      w.shared_gate = matrix(p + "ffn_gate_shexp.weight", c.n_ff_shared, c.n_embd);
      w.shared_up = matrix(p + "ffn_up_shexp.weight", c.n_ff_shared, c.n_embd);
      w.shared_down = matrix(p + "ffn_down_shexp.weight", c.n_embd, c.n_ff_shared);
      // Stored as a vector [n_embd].
      if (const GgufTensor* t = find(p + "ffn_gate_inp_shexp.weight")) {
        w.shared_router = view(*t, 1, c.n_embd);
      }
    }
    return w;
  }

  // One tensor of all experts, or (older files) one tensor an expert.
  Matrix expert(const std::string& prefix, const char* which, int64_t e, int64_t rows,
                int64_t cols) const {
    const std::string joined = prefix + which + "_exps.weight";
    if (const GgufTensor* t = find(joined)) {
      return view(*t, rows, cols, e, config_.n_expert);
    }
    const std::string single = prefix + which + "." + std::to_string(e) + ".weight";
    const GgufTensor* t = find(single);
    if (!t) fail(file_.path(), "expected tensor " + joined + ", found none");
    return view(*t, rows, cols);
  }

  Expert expert(int64_t il, int64_t e) const {
    const std::string p = "blk." + std::to_string(il) + ".";
    const ModelConfig& c = config_;
    return {expert(p, "ffn_gate", e, c.n_ff_expert, c.n_embd),
            expert(p, "ffn_up", e, c.n_ff_expert, c.n_embd),
            expert(p, "ffn_down", e, c.n_embd, c.n_ff_expert)};
  }

 private:
  const GgufFile& file_;
  const ModelConfig& config_;
  Weights& weights_;
  mutable std::set<const GgufTensor*> used_;
};

// Adds what one token reads of a layer's own matrices.
void count_layer(const LayerWeights& w, int64_t* bytes, int64_t* macs) {
  for (const Matrix* m : {&w.q, &w.k, &w.v, &w.o, &w.gate, &w.up, &w.down, &w.router,
                          &w.shared_gate, &w.shared_up, &w.shared_down, &w.shared_router}) {
    *bytes += m->nbytes();
    *macs += m->rows * m->cols;
  }
}

}  // namespace

ShardMemory::ShardMemory(const std::string& path, uint64_t begin, uint64_t file_size, int threads) {
  begin_ = std::min(begin, file_size);
  size_ = file_size - begin_;
  if (size_ == 0) return;
#if STOKER_POSIX
  // 2 MB alignment lets the kernel use huge pages, which saves a tenth of decode time in TLB
  // misses.
  const uint64_t reserve = size_ + kHugePage;
  void* p = ::mmap(nullptr, reserve, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) {
    throw Error(ErrorKind::kBudget, path + ": no memory for " + std::to_string(size_) + " bytes");
  }
  const uint64_t start = reinterpret_cast<uint64_t>(p);
  const uint64_t aligned = (start + kHugePage - 1) / kHugePage * kHugePage;
  if (aligned > start) ::munmap(p, aligned - start);
  const uint64_t end = start + reserve, used = aligned + size_;
  const uint64_t page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  const uint64_t used_end = (used + page - 1) / page * page;
  if (end > used_end) ::munmap(reinterpret_cast<void*>(used_end), end - used_end);
  base_ = reinterpret_cast<uint8_t*>(aligned);
#if defined(MADV_HUGEPAGE)
  ::madvise(base_, size_, MADV_HUGEPAGE);
#endif
  const std::string error = read_pieces(path, begin_, size_, base_, threads);
  if (!error.empty()) {
    ::munmap(base_, size_);
    fail(path, error);
  }
  ::mprotect(base_, size_, PROT_READ);
#else
  (void)threads;
  base_ = static_cast<uint8_t*>(::operator new(size_, std::align_val_t(64)));
  std::ifstream in(path, std::ios::binary);
  in.seekg(static_cast<std::streamoff>(begin_));
  in.read(reinterpret_cast<char*>(base_), static_cast<std::streamsize>(size_));
  if (static_cast<uint64_t>(in.gcount()) != size_) {
    ::operator delete(base_, std::align_val_t(64));
    fail(path, "expected " + std::to_string(file_size) + " bytes, found fewer");
  }
#endif
}

ShardMemory::~ShardMemory() {
  if (!base_) return;
#if STOKER_POSIX
  ::munmap(base_, size_);
#else
  ::operator delete(base_, std::align_val_t(64));
#endif
}

Weights load_weights(const GgufFile& file, const ModelConfig& config, int threads) {
  Weights w;
  // Unsupported tensors are refused before anything large is read.
  Loader loader(file, config, w);
  for (const GgufTensor& t : file.tensors()) loader.format(t);
  for (size_t s = 0; s < file.shards().size(); ++s) {
    uint64_t begin = UINT64_MAX;
    for (const GgufTensor& t : file.tensors()) {
      if (t.shard == static_cast<int>(s)) begin = std::min(begin, t.offset);
    }
    const uint64_t size = file.shard_nbytes()[s];
    if (begin == UINT64_MAX) begin = size;
    w.shards.push_back(std::make_unique<ShardMemory>(file.shards()[s], begin, size, threads));
    w.resident_bytes += static_cast<int64_t>(size - begin);
  }
  const ModelConfig& c = config;
  w.embedding = loader.matrix("token_embd.weight", c.n_vocab, c.n_embd);
  w.output = loader.matrix("output.weight", c.n_vocab, c.n_embd, false);
  if (!w.output) w.output = w.embedding;
  w.output_norm = loader.vector("output_norm.weight", c.n_embd);
  w.output_bias = loader.vector("output.bias", c.n_vocab, false);
  w.rope_factors = loader.vector("rope_freqs.weight", c.rope.n_rot / 2, false);
  w.rope_factors_long = loader.vector("rope_factors_long.weight", c.rope.n_rot / 2, false);
  w.rope_factors_short = loader.vector("rope_factors_short.weight", c.rope.n_rot / 2, false);
  std::unique_ptr<ResidentExperts> experts;
  if (c.is_mixture()) experts = std::make_unique<ResidentExperts>(c.n_layer);
  w.token_bytes = w.output.nbytes();
  for (int64_t il = 0; il < c.n_layer; ++il) {
    w.layers.push_back(loader.layer(il));
    count_layer(w.layers.back(), &w.token_bytes, &w.layer_macs);
    if (!w.layers.back().router) continue;
    for (int64_t e = 0; e < c.n_expert; ++e) experts->add(il, loader.expert(il, e));
    w.token_bytes += experts->layer_bytes(il) / c.n_expert * c.n_expert_used;
    w.layer_macs += c.n_expert_used * 3 * c.n_ff_expert * c.n_embd;
  }
  loader.check_all_used();
  w.experts = std::move(experts);
  return w;
}

}  // namespace stoker
