// The kernel table: what a weight format can do on each instruction set.
//
// All kernels share one arithmetic. A row of K weights is cut into groups of G (16 or 32) that
// share a scale s and, in some formats, an offset m: w = s * q + m with q a small signed integer.
// Activations are int8 with a float scale t per 32. For every (row, token) every kernel computes,
// in this order,
//
//     acc = 0
//     for each group g in order:
//       acc = fma(float(sum_k q[k] * a[k]), s_g * t_g, acc)        // the integer sum is exact
//       if the format has offsets: acc = fma(m_g, t_g * float(sum_k a[k]), acc)
//
// so that scalar, AVX2, AVX-512 and NEON, one token or five hundred, give the same bits. Float
// formats (F32, F16, BF16) multiply float activations: lane j of 16 accumulates k = j, j+16, ...
// with fma; the lanes are then summed as ((l0+l8)+(l4+l12))+... (reduce_add of isa/vec_*.h).
#pragma once

#include <cstddef>
#include <cstdint>

namespace stoker {

enum class FormatId : uint32_t {
#define STOKER_FORMAT(name, id, block, bytes) name = id,
#include "kernels_cpu/formats.inc"
#undef STOKER_FORMAT
};

enum class Isa : int {
#define STOKER_ISA_ROW(name) name,
#include "kernels_cpu/isa.inc"
#undef STOKER_ISA_ROW
};
inline constexpr int kIsaCount = 6;

// The type of the activations that a format's kernels take.
enum class ActKind { f32, i8 };

// Activations of `tokens` tokens, `cols` values each. For ActKind::f32 only `x` is set; for
// ActKind::i8 the other three arrays are, and cols is a multiple of 32.
struct Activations {
  ActKind kind = ActKind::f32;
  int64_t tokens = 0;
  int64_t cols = 0;
  const float* x = nullptr;        // [tokens][x_stride] f32
  int64_t x_stride = 0;            // floats
  const int8_t* q = nullptr;       // [tokens][q_stride] int8 in -127..127
  int64_t q_stride = 0;            // bytes; a multiple of 64, q is 64-byte aligned
  const float* scale = nullptr;    // [tokens][cols / 32] f32
  const int32_t* sum16 = nullptr;  // [tokens][cols / 16] int32: sum of q over 16 values
};

// A matmul sets y[i * y_stride + r] = sum_k W[r][k] * x[token(i)][k] for r in [row_begin, row_end)
// and i in [0, n_tokens), with token(i) = token_list ? token_list[i] : i.
struct MatmulArgs {
  const uint8_t* w = nullptr;  // [rows][row_bytes] in the file's own layout; any alignment
  int64_t row_bytes = 0;
  int64_t row_begin = 0;
  int64_t row_end = 0;
  Activations x;
  const int32_t* token_list = nullptr;  // [n_tokens] or null
  int64_t n_tokens = 0;
  float* y = nullptr;  // [n_tokens][y_stride] f32
  int64_t y_stride = 0;
  uint8_t* scratch = nullptr;  // matmul_scratch_bytes(cols) bytes, 64-byte aligned, this thread's
};
using MatmulFn = void (*)(const MatmulArgs&);

struct Format {
  const char* name;
  FormatId id;
  int block;        // weights a block
  int block_bytes;  // bytes a block
  ActKind act;
  // n is a multiple of `block`. src / dst may have any alignment.
  void (*dequantize)(const uint8_t* src, float* dst, int64_t n);
  // importance holds [n] weights of the squared error, or is null. quantize is null where the
  // format is only read.
  void (*quantize)(const float* src, uint8_t* dst, int64_t n, const float* importance);
  MatmulFn matmul[kIsaCount];  // null where this build or format has no kernel for the ISA
};

// Returns nullptr where the type is not supported.
const Format* find_format(FormatId id);
const Format* find_format(const char* name);
// Returns all rows of formats.inc in order and sets *count to their number.
const Format* const* all_formats(int* count);

// Returns the bytes of one row of `cols` weights.
inline int64_t row_bytes(const Format& f, int64_t cols) { return cols / f.block * f.block_bytes; }

const char* isa_name(Isa isa);
// Returns true where the instruction set is compiled in and a probe of it has run on this machine.
bool isa_usable(Isa isa);
// Returns the best usable instruction set, or the one that STOKER_ISA names; throws stoker::Error
// where that one is not usable.
Isa active_isa();
// Returns the kernel for `isa`, or the nearest usable one below it (scalar always exists).
MatmulFn matmul_kernel(const Format& f, Isa isa);

// Returns the bytes of per-thread scratch that a matmul over `cols` columns needs.
size_t matmul_scratch_bytes(int64_t cols);

// Quantizes one token: x[cols] -> q[cols] (zero-padded to a multiple of 64), scale[cols/32],
// sum16[cols/16]. scale = max|x| / 127 (0 for an all-zero group, q then 0);
// q = round-to-nearest-even(x * (127 / max|x|)). A group with a NaN or infinity gets q = 0 and
// scale = NaN, so that outputs become NaN; one whose maximum is below 2^-116 counts as zero. The
// bits are the same on every ISA.
using QuantizeActFn = void (*)(const float* x, int64_t cols, int8_t* q, float* scale,
                               int32_t* sum16);
QuantizeActFn quantize_act_kernel(Isa isa);

}  // namespace stoker
