// Function-level targets: code between STOKER_BEGIN_<ISA> and STOKER_END_TARGET (templates and
// lambdas included) is compiled for that instruction set; the rest of the binary stays at the
// platform's baseline. Never include a standard header inside such a region.
#pragma once

#define STOKER_PRAGMA(x) _Pragma(#x)
#if defined(__x86_64__) || defined(_M_X64)
#define STOKER_X86 1
#include <immintrin.h>
#elif defined(__aarch64__) || defined(_M_ARM64)
#define STOKER_ARM64 1
#include <arm_neon.h>
#endif

#define STOKER_FEATURES_AVX2 "avx2,fma,f16c"
#define STOKER_FEATURES_AVXVNNI "avx2,fma,f16c,avxvnni"
#define STOKER_FEATURES_AVX512 \
  "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi"
// The baseline of aarch64 here is ARMv8-A; dotprod and fp16 conversions need ARMv8.2.
#if defined(__clang__)
#define STOKER_FEATURES_NEON "dotprod"
#define STOKER_FEATURES_I8MM "dotprod,i8mm"
#define STOKER_BEGIN_TARGET(features) \
  STOKER_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define STOKER_END_TARGET STOKER_PRAGMA(clang attribute pop)
#elif defined(__GNUC__)
#define STOKER_FEATURES_NEON "arch=armv8.2-a+dotprod"
#define STOKER_FEATURES_I8MM "arch=armv8.2-a+dotprod+i8mm"
#define STOKER_BEGIN_TARGET(features) \
  STOKER_PRAGMA(GCC push_options) STOKER_PRAGMA(GCC target(features))
#define STOKER_END_TARGET STOKER_PRAGMA(GCC pop_options)
#else  // MSVC compiles every intrinsic everywhere
#define STOKER_BEGIN_TARGET(features)
#define STOKER_END_TARGET
#endif

#define STOKER_BEGIN_AVX2 STOKER_BEGIN_TARGET(STOKER_FEATURES_AVX2)
#define STOKER_BEGIN_AVXVNNI STOKER_BEGIN_TARGET(STOKER_FEATURES_AVXVNNI)
#define STOKER_BEGIN_AVX512 STOKER_BEGIN_TARGET(STOKER_FEATURES_AVX512)
#define STOKER_BEGIN_NEON STOKER_BEGIN_TARGET(STOKER_FEATURES_NEON)
#define STOKER_BEGIN_I8MM STOKER_BEGIN_TARGET(STOKER_FEATURES_I8MM)

#if defined(_MSC_VER) && !defined(__clang__)
#define STOKER_INLINE __forceinline
#else
#define STOKER_INLINE inline __attribute__((always_inline))
#endif
