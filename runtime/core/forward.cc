#include "runtime/core/forward.h"

#include <algorithm>
#include <vector>

#include "runtime/core/sequence.h"

namespace stoker {

namespace {

// A piece of work below this many bytes of weights costs more to hand out than to do.
constexpr int64_t kPieceBytes = 24 * 1024;
// Kernels walk rows in tiles of 16; a prompt's piece of 64 rows reuses the packed tokens.
constexpr int64_t kRowTile = 16;
constexpr int64_t kPromptRows = 64;
// Fewer tokens than this are decoding: pieces by bytes, at most this many rows.
constexpr int64_t kDecodeTokens = 8;
constexpr int64_t kDecodeRows = 4096;
// Query rows (token, head) of one piece of attention.
constexpr int64_t kAttentionRows = 64;

bool int8(const Matrix& m) { return m.format->act == ActKind::i8; }

// Returns the rows of `a` from row `first` on, for a matrix that wants `kind`.
Activations from_row(Activations a, int64_t first, ActKind kind) {
  a.kind = kind;
  a.x += first * a.x_stride;
  if (a.q) {
    a.q += first * a.q_stride;
    a.scale += first * (a.cols / 32);
    a.sum16 += first * (a.cols / 16);
  }
  return a;
}

}  // namespace

Forward::Forward(const Engine& engine, std::span<const Row> rows, Observer* observer)
    : engine_(engine),
      config_(engine.config()),
      ops_(engine.ops()),
      s_(engine.scratch()),
      observer_(observer),
      n_(static_cast<int64_t>(rows.size())) {
  // Rows whose products all have two terms come first, so that they are a range.
  const auto place = [&](bool sinks) {
    for (size_t i = 0; i < rows.size(); ++i) {
      const Row& row = rows[i];
      if ((row.position < kSinkTokens) != sinks) continue;
      const Placed placed{&row.sequence->kv(), row.position, row.token};
      const bool follows = !rows_.empty() && !runs_.empty() && rows_.back().kv == placed.kv &&
                           rows_.back().position + 1 == placed.position;
      if (!follows) runs_.push_back({static_cast<int64_t>(rows_.size()), 0});
      ++runs_.back().n;
      rows_.push_back(placed);
      order_.push_back(static_cast<int32_t>(i));
    }
  };
  place(true);
  n_sinks_ = static_cast<int64_t>(rows_.size());
  place(false);
}

int64_t Forward::max_piece_values(int64_t rows) {
  return std::max(kDecodeTokens * kDecodeRows, rows * kPromptRows);
}

void Forward::begin() {
  const ModelConfig& c = config_;
  embed(s_.x);
  const int64_t half = c.rope.n_rot / 2;
  const bool sliding = engine_.rope(true).size() > 0;
  for_rows(n_, c.n_embd + 64 * half, [&](int64_t i, int) {
    float* x = s_.x + i * c.n_embd;
    if (c.embedding_scale != 1) ops_.scale(x, c.embedding_scale, c.n_embd);
    if (half == 0) return;
    const int64_t position = rows_[static_cast<size_t>(i)].position;
    engine_.rope(false).angles(position, s_.angles + i * c.rope.n_rot);
    if (sliding) {
      engine_.rope(true).angles(position, s_.angles + (engine_.plan().chunk + i) * c.rope.n_rot);
    }
  });
  if (observer_) observer_->hidden(-1, s_.x);
}

void Forward::embed(float* x) {
  const Matrix& e = engine_.weights().embedding;
  const int64_t width = config_.n_embd;
  if (e.data) {
    for_rows(n_, width, [&](int64_t i, int) {
      e.format->dequantize(e.data + rows_[static_cast<size_t>(i)].token * e.stride, x + i * width,
                           width);
    });
    return;
  }
  std::vector<int32_t> tokens;
  for (const Placed& row : rows_) tokens.push_back(row.token);
  const auto all = std::span<const int32_t>(tokens);
  for (size_t first = 0; first < all.size(); first += WeightStream::kLookupRows) {
    const auto rows = engine_.stream()->rows(
        all.subspan(first, std::min(WeightStream::kLookupRows, all.size() - first)));
    float* out = x + static_cast<int64_t>(first) * width;
    for_rows(static_cast<int64_t>(rows.size()), width, [&](int64_t i, int) {
      e.format->dequantize(rows[static_cast<size_t>(i)], out + i * width, width);
    });
  }
}

void Forward::norm(const float* in, const Vector& w, float* out) {
  const int64_t n = config_.n_embd;
  for_rows(n_, n, [&](int64_t i, int) {
    ops_.rms_norm(in + i * n, w.data(), config_.norm_eps, out + i * n, n);
  });
}

void Forward::add(float* y, const float* x) {
  const int64_t n = config_.n_embd;
  for_rows(n_, n, [&](int64_t i, int) { ops_.add(y + i * n, x + i * n, n); });
}

Forward::Input Forward::input(const float* x, int64_t n, int64_t cols, bool quantize,
                              int64_t low_rows, std::span<const int32_t> rows,
                              const int32_t* token) {
  Input in;
  Activations& a = in.high;
  a.kind = ActKind::f32;
  a.tokens = n;
  a.cols = cols;
  a.x = x;
  a.x_stride = cols;
  if (!quantize) return in;
  a.q = s_.act_q;
  a.q_stride = (cols + 63) / 64 * 64;
  a.scale = s_.act_scale;
  a.sum16 = s_.act_sum;
  in.low_rows = low_rows;
  if (low_rows > 0) {
    in.low = a;
    in.low.q += s_.rows * a.q_stride;
    in.low.scale += s_.rows * (cols / 32);
    in.low.sum16 += s_.rows * (cols / 16);
  }
  const QuantizeActFn quantize_row = quantize_act_kernel(engine_.plan().isa);
  const auto row = [&](const float* values, int64_t i) {
    quantize_row(values, cols, s_.act_q + i * a.q_stride, s_.act_scale + i * (cols / 32),
                 s_.act_sum + i * (cols / 16));
  };
  const int64_t count = rows.empty() ? n : static_cast<int64_t>(rows.size());
  for_rows(count, cols, [&](int64_t r, int thread) {
    const int64_t i = rows.empty() ? r : rows[static_cast<size_t>(r)];
    row(x + i * cols, i);
    if ((token ? token[i] : i) >= low_rows) return;
    auto* error = reinterpret_cast<float*>(thread_scratch(thread));
    ops_.rounding_error(x + i * cols, a.q + i * a.q_stride, a.scale + i * (cols / 32), error, cols);
    row(error, s_.rows + i);
  });
  return in;
}

void Forward::multiply(std::span<const Product> products, const Input& in) {
  if (observer_) {
    for (const Product& p : products) {
      observer_->product(*p.matrix, in.high, p.token_list, p.first, p.n);
    }
  }
  const auto resident = [](const Product& p) { return p.matrix->data != nullptr; };
  if (std::all_of(products.begin(), products.end(), resident)) {
    multiply_resident(products, in);
  } else {
    multiply_streamed(products, in);
  }
}

void Forward::multiply_streamed(std::span<const Product> products, const Input& in) {
  WeightStream& stream = *engine_.stream();
  // The rows of a product: all rows of a matrix in memory, or those of a piece.
  struct Part {
    const Product* product;
    int32_t piece;  // -1: in memory
  };
  std::vector<Part> parts;
  for (const Product& p : products) {
    const Matrix& m = *p.matrix;
    if (m.data) parts.push_back({&p, -1});
    const WeightStream::Range range = m.data ? WeightStream::Range{} : stream.pieces(m.tensor);
    for (int32_t i = range.first; i < range.last; ++i) {
      const StreamPiece& piece = stream.piece(i);
      if (piece.row_begin < m.first_row + m.rows && piece.row_end > m.first_row) {
        parts.push_back({&p, i});
      }
    }
  }
  std::vector<Matrix> matrices;
  std::vector<Product> ready;
  matrices.reserve(parts.size());
  for (size_t next = 0; next < parts.size();) {
    matrices.clear();
    ready.clear();
    for (; next < parts.size(); ++next) {
      const Part& part = parts[next];
      if (part.piece < 0) {
        ready.push_back(*part.product);
        continue;
      }
      const uint8_t* data = stream.get(part.piece, ready.empty());
      if (!data) break;
      Matrix m = *part.product->matrix;
      const StreamPiece& piece = stream.piece(part.piece);
      const int64_t begin = std::max(m.first_row, piece.row_begin);
      const int64_t end = std::min(m.first_row + m.rows, piece.row_end);
      Product p = *part.product;
      p.y += begin - m.first_row;
      m.data = data + (begin - piece.row_begin) * m.stride;
      m.first_row = begin;
      m.rows = end - begin;
      matrices.push_back(m);
      p.matrix = &matrices.back();
      ready.push_back(p);
    }
    multiply_resident(ready, in);
    stream.release();
  }
}

void Forward::multiply_resident(std::span<const Product> products, const Input& in) {
  // The row pieces of all products get one numbering, so that one phase covers them.
  struct Part {
    int64_t first_piece, rows_per_piece;
  };
  Part parts[8];
  std::vector<Part> many;  // experts of a prompt
  Part* part = parts;
  if (products.size() > std::size(parts)) {
    many.resize(products.size());
    part = many.data();
  }
  int64_t pieces = 0;
  for (size_t i = 0; i < products.size(); ++i) {
    const Product& p = products[i];
    int64_t rows = kPromptRows;
    if (p.n < kDecodeTokens) {
      rows = kPieceBytes / p.matrix->stride / kRowTile * kRowTile;
      // At least four pieces a thread even out threads of unequal speed.
      const int64_t fair = p.matrix->rows / (4 * engine_.plan().threads) / kRowTile * kRowTile;
      rows = std::clamp(std::max(rows, fair), kRowTile, kDecodeRows);
    }
    part[i] = {pieces, rows};
    pieces += (p.matrix->rows + rows - 1) / rows;
  }
  engine_.pool().parallel_for(pieces, 1, [&](int64_t begin, int64_t end, int thread) {
    size_t i = 0;
    for (int64_t piece = begin; piece < end; ++piece) {
      while (i + 1 < products.size() && part[i + 1].first_piece <= piece) ++i;
      const Product& p = products[i];
      const Matrix& m = *p.matrix;
      MatmulArgs args;
      args.w = m.data;
      args.row_bytes = m.stride;
      args.row_begin = (piece - part[i].first_piece) * part[i].rows_per_piece;
      args.row_end = std::min(m.rows, args.row_begin + part[i].rows_per_piece);
      args.x = from_row(in.high, p.first, m.format->act);
      args.token_list = p.token_list;
      args.n_tokens = p.n;
      args.y = p.y;
      args.y_stride = p.y_stride;
      args.scratch = thread_scratch(thread);
      const MatmulFn matmul = matmul_kernel(*m.format, engine_.plan().isa);
      matmul(args);
      const int64_t n_low = low_count(p, in);
      if (n_low == 0 || m.format->act != ActKind::i8) continue;
      // The piece's weights are still in the cache.
      const int64_t rows = args.row_end - args.row_begin;
      auto* low = reinterpret_cast<float*>(thread_scratch(thread) + s_.thread_low);
      args.x = from_row(in.low, p.first, ActKind::i8);
      args.n_tokens = n_low;
      args.y = low - args.row_begin;
      args.y_stride = rows;
      matmul(args);
      for (int64_t t = 0; t < n_low; ++t) {
        ops_.add(p.y + t * p.y_stride + args.row_begin, low + t * rows, rows);
      }
    }
  });
}

void Forward::store_kv(int64_t il) {
  const ModelConfig& c = config_;
  const LayerWeights& w = layer(il);
  const int64_t q_width = c.n_head * c.head_dim, k_width = c.n_head_kv * c.head_dim;
  const int64_t v_width = c.n_head_kv * c.head_dim_v;
  const size_t l = static_cast<size_t>(il);
  const float* angles = s_.angles;
  if (c.sliding[l] && engine_.rope(true).size() > 0) {
    angles += engine_.plan().chunk * c.rope.n_rot;
  }
  for_rows(n_, 2 * (q_width + k_width + v_width), [&](int64_t i, int) {
    const Placed& row = rows_[static_cast<size_t>(i)];
    float* q = s_.q + i * q_width;
    float* k = s_.k + i * k_width;
    float* v = s_.v + i * v_width;
    if (!w.q_bias.empty()) ops_.add(q, w.q_bias.data(), q_width);
    if (!w.k_bias.empty()) ops_.add(k, w.k_bias.data(), k_width);
    if (!w.v_bias.empty()) ops_.add(v, w.v_bias.data(), v_width);
    const auto heads = [&](float* x, int64_t n_head, const Vector& norm_weight) {
      // The norm covers all heads at once if its weight has their width.
      const bool whole = static_cast<int64_t>(norm_weight.size()) > c.head_dim;
      if (whole) {
        ops_.rms_norm(x, norm_weight.data(), c.norm_eps, x, n_head * c.head_dim);
      }
      for (int64_t h = 0; h < n_head; ++h) {
        float* head = x + h * c.head_dim;
        if (!norm_weight.empty() && !whole) {
          ops_.rms_norm(head, norm_weight.data(), c.norm_eps, head, c.head_dim);
        }
        if (c.rotates[l]) ops_.rope(head, angles + i * c.rope.n_rot, c.rope.n_rot, c.rope.neox);
      }
    };
    heads(q, c.n_head, w.q_norm);
    heads(k, c.n_head_kv, w.k_norm);
    ops_.scale(q, c.attention_scale, q_width);
    for (int64_t h = 0; h < c.n_head_kv; ++h) {
      ops_.store_kv(row.kv->head(il, h), row.position, k + h * c.head_dim, v + h * c.head_dim_v,
                    c.head_dim, c.head_dim_v);
    }
  });
}

void Forward::attend(int64_t il) {
  const ModelConfig& c = config_;
  const int64_t group = c.n_head / c.n_head_kv;
  const bool sliding = c.sliding[static_cast<size_t>(il)];
  // A piece is some rows of a run times some heads that share a KV head.
  int64_t heads = std::min(group, kAttentionRows);
  if (n_ * c.n_head_kv < engine_.plan().threads) {
    const int64_t split = (engine_.plan().threads + c.n_head_kv - 1) / c.n_head_kv;
    heads = std::max<int64_t>(1, (group + split - 1) / split);
  }
  const int64_t head_parts = (group + heads - 1) / heads;
  const int64_t rows_a_piece = std::max<int64_t>(1, std::min<int64_t>(16, kAttentionRows / heads));
  struct Part {
    int64_t first, n;  // rows
  };
  // The longest rows (last tokens) come first, so that threads finish together.
  std::vector<Part> parts;
  for (size_t r = runs_.size(); r-- > 0;) {
    const Run& run = runs_[r];
    for (int64_t at = (run.n - 1) / rows_a_piece * rows_a_piece; at >= 0; at -= rows_a_piece) {
      parts.push_back({run.first + at, std::min(rows_a_piece, run.n - at)});
    }
  }
  const int64_t a_part = c.n_head_kv * head_parts;
  const int64_t pieces = a_part * static_cast<int64_t>(parts.size());
  engine_.pool().parallel_for(pieces, 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const Part& part = parts[static_cast<size_t>(piece / a_part)];
      const int64_t rest = piece % a_part;
      const int64_t kv_head = rest / head_parts;
      const int64_t h0 = kv_head * group + rest % head_parts * heads;
      const int64_t h1 = std::min(h0 + heads, (kv_head + 1) * group);
      const float* q[kAttentionRows];
      float* out[kAttentionRows];
      int64_t first[kAttentionRows], last[kAttentionRows];
      int64_t rows = 0;
      for (int64_t t = part.first; t < part.first + part.n; ++t) {
        const int64_t position = rows_[static_cast<size_t>(t)].position;
        for (int64_t h = h0; h < h1; ++h, ++rows) {
          q[rows] = s_.q + (t * c.n_head + h) * c.head_dim;
          out[rows] = s_.o + (t * c.n_head + h) * c.head_dim_v;
          first[rows] = sliding ? std::max<int64_t>(0, position - c.sliding_window + 1) : 0;
          last[rows] = c.causal ? position : rows_.back().position;
        }
      }
      AttentionArgs args;
      args.kv = rows_[static_cast<size_t>(part.first)].kv->head(il, kv_head);
      args.head_dim = c.head_dim;
      args.head_dim_v = c.head_dim_v;
      args.rows = rows;
      args.q = q;
      args.out = out;
      args.first = first;
      args.last = last;
      args.softcap = c.attention_softcap;
      args.scratch = reinterpret_cast<float*>(thread_scratch(thread));
      ops_.attention(args);
    }
  });
}

void Forward::attention(int64_t il, const float* in, float* out) {
  const ModelConfig& c = config_;
  const LayerWeights& w = layer(il);
  const Input x =
      input(in, n_, c.n_embd, int8(w.q) || int8(w.k) || int8(w.v), low_rows(least(w.q)));
  const Product qkv[] = {{&w.q, s_.q, w.q.rows, nullptr, 0, n_},
                         {&w.k, s_.k, w.k.rows, nullptr, 0, n_},
                         {&w.v, s_.v, w.v.rows, nullptr, 0, n_}};
  multiply(qkv, x);
  store_kv(il);
  attend(il);
  const Input o = input(s_.o, n_, w.o.cols, int8(w.o), low_rows(least(w.o)));
  const Product product[] = {{&w.o, out, c.n_embd, nullptr, 0, n_}};
  multiply(product, o);
  if (!w.o_bias.empty()) {
    for_rows(n_, c.n_embd,
             [&](int64_t i, int) { ops_.add(out + i * c.n_embd, w.o_bias.data(), c.n_embd); });
  }
}

void Forward::gate_rows(float* gate, const float* up, int64_t n, int64_t width,
                        std::span<const int32_t> rows) {
  const int64_t count = rows.empty() ? n : static_cast<int64_t>(rows.size());
  for_rows(count, 4 * width, [&](int64_t r, int) {
    const int64_t i = rows.empty() ? r : rows[static_cast<size_t>(r)];
    ops_.gate_mul(config_.activation, gate + i * width, up + i * width, width);
  });
}

void Forward::feed_forward(int64_t il, const float* in, float* out) {
  if (observer_) observer_->block_input(il, in);
  const ModelConfig& c = config_;
  const LayerWeights& w = layer(il);
  const Input x = input(in, n_, c.n_embd, int8(w.gate) || int8(w.up), low_rows(least(w.gate)));
  const Product gate_up[] = {{&w.gate, s_.gate, c.n_ff, nullptr, 0, n_},
                             {&w.up, s_.up, c.n_ff, nullptr, 0, n_}};
  multiply(gate_up, x);
  gate_rows(s_.gate, s_.up, n_, c.n_ff);
  const Input h = input(s_.gate, n_, c.n_ff, int8(w.down), low_rows(least(w.down)));
  const Product down[] = {{&w.down, out, c.n_embd, nullptr, 0, n_}};
  multiply(down, h);
}

void Forward::final_norm(std::span<const int32_t> rows, float* out) {
  const ModelConfig& c = config_;
  for_rows(static_cast<int64_t>(rows.size()), c.n_embd, [&](int64_t i, int) {
    ops_.rms_norm(s_.x + rows[static_cast<size_t>(i)] * c.n_embd,
                  engine_.weights().output_norm.data(), c.norm_eps, out + i * c.n_embd, c.n_embd);
  });
}

void Forward::logits(const float* hidden, int64_t n, float* out) {
  const ModelConfig& c = config_;
  const Weights& w = engine_.weights();
  const Input x = input(hidden, n, c.n_embd, int8(w.output), two_terms(least(w.output)) ? n : 0);
  const Product product[] = {{&w.output, out, c.n_vocab, nullptr, 0, n}};
  multiply(product, x);
  if (w.output_bias.empty() && c.final_softcap == 0) return;
  for_rows(n, c.n_vocab, [&](int64_t i, int) {
    float* row = out + i * c.n_vocab;
    if (!w.output_bias.empty()) ops_.add(row, w.output_bias.data(), c.n_vocab);
    if (c.final_softcap != 0) ops_.softcap(row, c.final_softcap, c.n_vocab);
  });
}

}  // namespace stoker
