// The scalar reference of every integer format: dequantize and matmul over a codec.
//
// A codec is a struct of a formats/<format>.cc:
//   Block                  the block as it lies in the file, alignment 1
//   kBlock, kGroup         weights a block and a group (16 or 32); kGroup divides kBlock
//   kOffset                true where the format has an offset m
//   unpack(b, g, q, s, m)  group g of block b: q[kGroup] int8, scale s, offset m (0 where !kOffset)
// The arithmetic is the one that kernel.h describes; every other ISA is tested against this.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels_cpu/kernel.h"

namespace stoker {

template <class Codec>
void dequantize_scalar(const uint8_t* src, float* dst, int64_t n) {
  static_assert(alignof(typename Codec::Block) == 1, "blocks lie at any address");
  const auto* block = reinterpret_cast<const typename Codec::Block*>(src);
  for (int64_t i = 0; i < n; i += Codec::kBlock, ++block) {
    for (int g = 0; g < Codec::kBlock / Codec::kGroup; ++g) {
      int8_t q[Codec::kGroup];
      float s, m;
      Codec::unpack(*block, g, q, &s, &m);
      for (int k = 0; k < Codec::kGroup; ++k) {
        const float w = s * static_cast<float>(q[k]);
        *dst++ = Codec::kOffset ? w + m : w;
      }
    }
  }
}

template <class Codec>
void matmul_scalar(const MatmulArgs& args) {
  constexpr int kGroup = Codec::kGroup;
  constexpr int kGroupsPerBlock = Codec::kBlock / kGroup;
  const Activations& x = args.x;
  for (int64_t r = args.row_begin; r < args.row_end; ++r) {
    const auto* row = reinterpret_cast<const typename Codec::Block*>(args.w + r * args.row_bytes);
    for (int64_t i = 0; i < args.n_tokens; ++i) {
      const int64_t token = args.token_list ? args.token_list[i] : i;
      const int8_t* a = x.q + token * x.q_stride;
      const float* scale = x.scale + token * (x.cols / 32);
      const int32_t* sum16 = x.sum16 + token * (x.cols / 16);
      float acc = 0;
      for (int64_t g = 0; g < x.cols / kGroup; ++g) {
        int8_t q[kGroup];
        float s, m;
        Codec::unpack(row[g / kGroupsPerBlock], static_cast<int>(g % kGroupsPerBlock), q, &s, &m);
        int32_t sum = 0;
        for (int k = 0; k < kGroup; ++k) sum += int32_t{q[k]} * a[g * kGroup + k];
        const float t = scale[g * kGroup / 32];
        acc = std::fmaf(static_cast<float>(sum), s * t, acc);
        if constexpr (Codec::kOffset) {
          const int32_t a_sum = kGroup == 16 ? sum16[g] : sum16[2 * g] + sum16[2 * g + 1];
          acc = std::fmaf(m, t * static_cast<float>(a_sum), acc);
        }
      }
      args.y[i * args.y_stride + r] = acc;
    }
  }
}

}  // namespace stoker
