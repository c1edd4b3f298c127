// Compiles one kernel source once per instruction set. Use, in a family's cpu.cpp:
//
//   #define HDROPS_ISA_SOURCE "deform_conv2d/forward_cpu.h"
//   #include "common/foreach_isa.h"
//   void deform_conv2d_forward_cpu(const Params& p) { HDROPS_ISA_CALL(forward(p)); }
//
// The source opens `namespace hdrops::HDROPS_ISA` and may use common/simd.h, which is included before it. It must
// include nothing itself and call no template of the standard library: a function of std:: instantiated here would be
// compiled with, say, AVX-512 under a name that the linker shares with code for every machine. Include what the
// kernels need (and only inlined functions of it) before this header. A lambda does not inherit the instruction set:
// let it call a function and nothing else.
//
// Define HDROPS_ISA_WITH_BF16 before a source that has its own kernels for the bf16 dot product; others run their
// AVX-512 form there. The header may be included for several sources in one file: define HDROPS_ISA_SOURCE anew.
#ifndef HDROPS_FOREACH_ISA
#define HDROPS_FOREACH_ISA
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/half.h"
#include "common/hd.h"
#include "common/isa.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define HDROPS_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define HDROPS_BEGIN_TARGET(set) HDROPS_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define HDROPS_END_TARGET HDROPS_PRAGMA(clang attribute pop)
#else
#define HDROPS_BEGIN_TARGET(set) HDROPS_PRAGMA(GCC push_options) HDROPS_PRAGMA(GCC target(set))
#define HDROPS_END_TARGET HDROPS_PRAGMA(GCC pop_options)
#endif

#if defined(__x86_64__)
#define HDROPS_ISA_CALL_WIDE(call) \
  case ::hdrops::Isa::amx:         \
  case ::hdrops::Isa::avx512_bf16: \
  case ::hdrops::Isa::avx512:      \
    return avx512::call;           \
  case ::hdrops::Isa::avx2:        \
    return avx2::call;
#define HDROPS_ISA_CALL_BF16(call) \
  case ::hdrops::Isa::amx:         \
  case ::hdrops::Isa::avx512_bf16: \
    return avx512_bf16::call;      \
  case ::hdrops::Isa::avx512:      \
    return avx512::call;           \
  case ::hdrops::Isa::avx2:        \
    return avx2::call;
#else
#define HDROPS_ISA_CALL_WIDE(call)
#define HDROPS_ISA_CALL_BF16(call)
#endif
// `return call` of the best instruction set; the second form for sources compiled with HDROPS_ISA_WITH_BF16. With
// HDROPS_LOWERED_ISA_ONLY (tests only) that is always the widest, so that the kernels, which are templates, are
// instantiated for no other: in a build with sanitizers they take most of the time.
#if defined(HDROPS_LOWERED_ISA_ONLY) && defined(__x86_64__)
#define HDROPS_ISA_CALL(call) return avx512::call
#define HDROPS_ISA_CALL_WITH_BF16(call) return avx512_bf16::call
#else
#define HDROPS_ISA_CALL(call)  \
  switch (::hdrops::isa()) {   \
    HDROPS_ISA_CALL_WIDE(call) \
    default:                   \
      return baseline::call;   \
  }
#define HDROPS_ISA_CALL_WITH_BF16(call) \
  switch (::hdrops::isa()) {            \
    HDROPS_ISA_CALL_BF16(call)          \
    default:                            \
      return baseline::call;            \
  }
#endif
#endif  // HDROPS_FOREACH_ISA

#define HDROPS_ISA baseline
#define HDROPS_VECTOR_BYTES 16
#include "common/simd.h"
#include HDROPS_ISA_SOURCE
#undef HDROPS_ISA
#undef HDROPS_VECTOR_BYTES

#if defined(__x86_64__)

#define HDROPS_HAVE_AVX2 1
HDROPS_BEGIN_TARGET("avx2,fma,f16c")
#define HDROPS_ISA avx2
#define HDROPS_VECTOR_BYTES 32
#include "common/simd.h"
#include HDROPS_ISA_SOURCE
#undef HDROPS_ISA
#undef HDROPS_VECTOR_BYTES
HDROPS_END_TARGET

// With HDROPS_LOWERED_ISA (tests only) the 64-byte kernels are compiled for AVX2, two registers a vector, so that a
// machine without AVX-512 can run their logic; what needs an AVX-512 intrinsic takes its portable form.
#if defined(HDROPS_LOWERED_ISA)
HDROPS_BEGIN_TARGET("avx2,fma,f16c")
#else
#define HDROPS_HAVE_AVX512 1
HDROPS_BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#endif
#define HDROPS_ISA avx512
#define HDROPS_VECTOR_BYTES 64
#include "common/simd.h"
#include HDROPS_ISA_SOURCE
#undef HDROPS_ISA
#undef HDROPS_VECTOR_BYTES
HDROPS_END_TARGET

#if defined(HDROPS_ISA_WITH_BF16)
#define HDROPS_BF16_DOT 1
#if defined(HDROPS_LOWERED_ISA)
HDROPS_BEGIN_TARGET("avx2,fma,f16c")
#else
#define HDROPS_HAVE_AVX512_BF16 1
HDROPS_BEGIN_TARGET(
    "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,prefer-vector-width=512")
#endif
#define HDROPS_ISA avx512_bf16
#define HDROPS_VECTOR_BYTES 64
#include "common/simd.h"
#include HDROPS_ISA_SOURCE
#undef HDROPS_ISA
#undef HDROPS_VECTOR_BYTES
HDROPS_END_TARGET
#undef HDROPS_HAVE_AVX512_BF16
#undef HDROPS_BF16_DOT
#endif

#undef HDROPS_HAVE_AVX512
#undef HDROPS_HAVE_AVX2

#endif  // x86

#undef HDROPS_ISA_SOURCE
#undef HDROPS_ISA_WITH_BF16
