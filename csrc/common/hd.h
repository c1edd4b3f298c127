// Qualifiers and index helpers shared by host and device code.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define HDROPS_HD __host__ __device__ __forceinline__
#else
#define HDROPS_HD inline __attribute__((always_inline))
#endif

namespace hdrops {

template <class T>
HDROPS_HD constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

template <class T>
HDROPS_HD constexpr T round_up(T a, T b) {
  return ceil_div(a, b) * b;
}

// Whether every linear index below `numel` fits a signed 32-bit integer, so that a kernel may use the fast index type.
HDROPS_HD constexpr bool fits_int32(int64_t numel) { return numel <= INT32_MAX; }

}  // namespace hdrops
