// Bilinear sampling of a grid with zeros outside, one axis at a time: the rule of deformable convolution (OP-1), shared
// by the CPU kernels (scalars and vectors of the compiler's extension) and the CUDA kernels (scalars).
//
// A position p samples the two grid points low = floor(p) and low + 1. It counts only if -1 < p < size; NaN and
// infinities fail that test, contribute nothing and are never converted to an integer. A grid point outside [0, size)
// contributes zero: its weight and its slope are zero and its index is that of the other point, so that every index
// may be read. At an integer position the slope is that of the cell to the right.
#pragma once
#include "common/hd.h"

namespace hdrops {

// Conversion to the integer type of the same width, towards zero.
HDROPS_HD void truncate_to(float position, int32_t& result) { result = int32_t(position); }
HDROPS_HD void truncate_to(double position, int64_t& result) { result = int64_t(position); }
HDROPS_HD void convert_to(int32_t value, float& result) { result = float(value); }
HDROPS_HD void convert_to(int64_t value, double& result) { result = double(value); }
#if defined(__GNUC__) && !defined(__CUDACC__)
template <class Real, class Int>
HDROPS_HD void truncate_to(Real position, Int& result) {
  result = __builtin_convertvector(position, Int);
}
template <class Real, class Int>
HDROPS_HD void convert_to(Int value, Real& result) {
  result = __builtin_convertvector(value, Real);
}
#endif

// Whether both hold: of bools, or of masks lane by lane. Where masks have registers of their own (AVX-512), GCC 12
// would take the `&` of two comparisons apart into lanes, unless it no longer knows that they were comparisons.
HDROPS_HD bool both(bool a, bool b) { return a && b; }
#if defined(__GNUC__) && !defined(__CUDACC__)
template <class Mask>
HDROPS_HD Mask both(Mask a, Mask b) {
#if defined(__x86_64__) && !defined(HDROPS_LOWERED_ISA)
  __asm__("" : "+v"(a), "+v"(b));
#endif
  return a & b;
}
#endif

template <class Real, class Int>
struct AxisSample {
  Int low, high;                 // indices of the two grid points, both within the grid if the position counts
  Real weight_low, weight_high;  // what each contributes
  Real slope_low, slope_high;    // derivatives of the weights by the position
};

// Whether the position counts. The result is a bool, or a vector of masks.
template <class Real>
HDROPS_HD auto inside_grid(Real position, Real size) {
  return both(position > Real{} - 1, position < size);
}

// The position must count; callers replace one that does not by zero. `size` is the grid's length, as both types.
template <class Real, class Int>
HDROPS_HD AxisSample<Real, Int> sample_axis(Real position, Int size) {
  Real zero{}, rounded, one = zero + 1;
  Int low;
  truncate_to(position, low);
  convert_to(low, rounded);
  low = rounded > position ? low - 1 : low;
  convert_to(low, rounded);
  Real fraction = position - rounded;
  Int high = low + 1, first{}, last = size - 1;
  auto low_exists = low >= first, high_exists = high <= last;
  return {low_exists ? low : first,      high_exists ? high : last, low_exists ? one - fraction : zero,
          high_exists ? fraction : zero, low_exists ? -one : zero,  high_exists ? one : zero};
}

}  // namespace hdrops
