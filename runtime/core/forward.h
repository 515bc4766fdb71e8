// One chunk of rows on its way through the layers: the building blocks that the families
// (runtime/arch) put together. All blocks give a row the same bits whatever else is in the chunk.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "runtime/core/engine.h"
#include "runtime/core/observer.h"
#include "runtime/core/row.h"
#include "runtime/kv/kv_cache.h"

namespace stoker {

class Forward {
 public:
  // rows [n]: rows of any sequences; observer: null if nothing is recorded. Both outlive it.
  Forward(const Engine& engine, std::span<const Row> rows, Observer* observer);

  // Returns the most output values of one piece of a product, for inputs of up to `rows` rows.
  static int64_t max_piece_values(int64_t rows);

  // Forward has the rows in an order of its own: its row i is row order()[i] of those it was given.
  std::span<const int32_t> order() const { return order_; }
  // Looks up and scales the embeddings.
  void begin();
  // Applies the final norm to rows of the residual stream, in Forward's order: out [rows][n_embd].
  void final_norm(std::span<const int32_t> rows, float* out);
  // Computes the logits of n normalised rows: out [n][n_vocab].
  void logits(const float* hidden, int64_t n, float* out);

  const ModelConfig& config() const { return config_; }
  const LayerWeights& layer(int64_t il) const {
    return engine_.weights().layers[static_cast<size_t>(il)];
  }
  float* x() const { return s_.x; }  // [rows][n_embd] residual stream
  float* a() const { return s_.a; }  // [rows][n_embd]
  float* b() const { return s_.b; }  // [rows][n_embd]

  // Computes out = rms_norm(in) * w, row by row; [rows][n_embd].
  void norm(const float* in, const Vector& w, float* out);
  // Computes y += x, [rows][n_embd].
  void add(float* y, const float* x);
  // Computes projections, norms of q and k, rotation, cache, attention and output projection.
  void attention(int64_t il, const float* in, float* out);
  // Computes the dense gated feed-forward.
  void feed_forward(int64_t il, const float* in, float* out);
  // Lets the store's predictor see the embeddings, before the first layer.
  void look_ahead_first();
  // Chooses the experts of every row and their weights, from in [rows][n_embd]. Prefetches them
  // where they are known before attention; in a pre-gated model it also chooses and prefetches
  // those of the next mixture layer.
  Routes route(int64_t il, const float* in);
  // Makes the choice of the one router (Routing::Where::kOnce), from the residual stream after
  // layer 0, prefetches it for all layers that use it, and keeps it for them.
  void route_once();
  const Routes& routes_kept() const { return routes_kept_; }
  // Computes the sum of the routed experts (and of the shared expert where the layer has one).
  void mixture(int64_t il, const float* in, const Routes& routes, float* out);

 private:
  // Models park attention that has nowhere to go on the first tokens, whose activations are then
  // hundreds of times larger than others: their rounding noise is in what every later token reads.
  static constexpr int64_t kSinkTokens = 2;

  // Rows of activations: in float32, and as int8 in one term or two if a format wants that.
  // The second term is the first one's rounding error, quantized again: together they carry about
  // 15 bits, and a product with both differs from one with floats by float32 rounding only.
  struct Input {
    Activations high;
    Activations low;
    int64_t low_rows = 0;  // the first rows have both terms
  };
  // A product y[i][0 .. rows) = matrix * input of the i-th row (of the list, if any).
  struct Product {
    const Matrix* matrix;
    float* y;
    int64_t y_stride;
    const int32_t* token_list;  // [n], or null: tokens from `first`
    int64_t first;
    int64_t n;
    int64_t low = -1;  // of them with both terms, the first ones; -1: what `low_rows` says
  };
  static int64_t low_count(const Product& p, const Input& in) {
    if (in.low_rows == 0 || p.low >= 0) return in.low_rows == 0 ? 0 : p.low;
    if (!p.token_list) return std::clamp<int64_t>(in.low_rows - p.first, 0, p.n);
    return std::lower_bound(p.token_list, p.token_list + p.n, in.low_rows) - p.token_list;
  }
  // Runs several products of the same input together, rows spread over the threads; those of
  // streamed weights as their pieces arrive.
  void multiply(std::span<const Product> products, const Input& in);
  void multiply_resident(std::span<const Product> products, const Input& in);
  void multiply_streamed(std::span<const Product> products, const Input& in);
  // Quantizes rows x [n][cols] for matrices that want int8; with `rows`, only those. With `token`
  // [n] a row's token decides whether it gets both terms, not its number. The result is valid until
  // the next call.
  Input input(const float* x, int64_t n, int64_t cols, bool quantize, int64_t low_rows,
              std::span<const int32_t> rows = {}, const int32_t* token = nullptr);
  bool two_terms(Precision least) const { return engine_.precision() >= least; }
  // Returns the lowest precision at which the activations of this matrix have two terms.
  static Precision least(const Matrix& m) {
    return m.two_term ? Precision::kBalanced : Precision::kHigh;
  }
  // Returns how many of the chunk's rows, from the first, get both terms for a matrix of precision
  // `least`: all rows from this precision on, below it the first tokens of sequences (kSinkTokens).
  int64_t low_rows(Precision least) const {
    if (two_terms(least)) return n_;
    return engine_.precision() < Precision::kBalanced ? 0 : n_sinks_;
  }
  // Computes gate = act(gate) * up on rows [n][width]; with `rows`, only those.
  void gate_rows(float* gate, const float* up, int64_t n, int64_t width,
                 std::span<const int32_t> rows = {});
  // Calls f(row, thread) for n rows of about `width` values; on the calling thread alone if there
  // is little to do.
  template <class F>
  void for_rows(int64_t n, int64_t width, F&& f) {
    constexpr int64_t kSerialValues = 8192;
    if (n * width <= kSerialValues) {
      for (int64_t i = 0; i < n; ++i) f(i, 0);
      return;
    }
    const int64_t grain = std::max<int64_t>(1, kSerialValues / 4 / std::max<int64_t>(width, 1));
    engine_.pool().parallel_for(n, grain, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t i = begin; i < end; ++i) f(i, thread);
    });
  }
  // Writes the embeddings of the rows to x [n][n_embd], as they are in the file.
  void embed(float* x);
  void store_kv(int64_t il);
  void attend(int64_t il);
  void shared_expert(int64_t il, const float* in, float* out);
  // Computes, for a pre-gated model, the logits [rows][n_expert] of the mixture layer after `il`.
  void pregate(int64_t il, const Input& in, float* logits);
  // Returns the next mixture layer before or after `il`; -1 or n_layer if there is none.
  int64_t mixture_before(int64_t il) const;
  int64_t mixture_after(int64_t il) const;
  // Chooses the experts of layer `il` and their weights by the router's logits in scratch; among
  // [rows][n_expert_used]: the experts, if they are known.
  Routes chosen(int64_t il, const std::vector<int32_t>& among = {});
  // Runs the routers of later layers on the present hidden states, for the store's predictor.
  class Probe;
  ExpertStore& experts() const { return *engine_.weights().experts; }
  uint8_t* thread_scratch(int thread) const { return s_.thread + thread * s_.thread_bytes; }

  const Engine& engine_;
  const ModelConfig& config_;
  const Ops& ops_;
  Scratch& s_;
  Observer* observer_;  // null: nobody watches
  // A row in Forward's order.
  struct Placed {
    const KvCache* kv;
    int64_t position;
    int32_t token;
  };
  // Rows that follow each other in one sequence.
  struct Run {
    int64_t first, n;
  };
  std::vector<int32_t> order_;
  std::vector<Placed> rows_;
  std::vector<Run> runs_;
  int64_t n_;            // rows
  int64_t n_sinks_ = 0;  // of them, from the first: those of a sequence's first kSinkTokens
  std::vector<int32_t> pregated_;  // [rows][n_expert_used] of the next mixture layer; or empty
  Routes routes_kept_;
};

}  // namespace stoker
