// A sampled response curve c[0 .. levels-1] over [0, 1]: what the kernels of every device tabulate before they look it
// up, and how a curve's gradient follows from the sums they keep.
//
// Linear (OP-6): x lies in segment i = floor(x * (levels - 1)) at fraction f, and y = c[i] + f * delta[i]. The last
// entry is a segment of its own with delta 0, so that x = 1 gives c[levels-1] exactly, with slope 0.
// Nearest (OP-8): x lies at level i = round(x * (levels - 1)), y = c[i], and the slope is the difference from the level
// below, per unit of x times `gradient_scale`.
#pragma once
#include <cmath>
#include <cstdint>

#include "common/hd.h"

namespace hdrops {

// Where a pixel lies on its curve; 0 <= index < levels. A NaN lies at level 0.
template <class T>
struct CurvePosition {
  int32_t index;
  T fraction;
};

HDROPS_HD float clamp_to_unit(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }
HDROPS_HD double clamp_to_unit(double x) { return fmin(fmax(x, 0.0), 1.0); }
// a * b - c; in float the product is not rounded, so that the fraction of a large position keeps all its bits.
HDROPS_HD float multiply_subtract(float a, float b, float c) { return fmaf(a, b, -c); }
HDROPS_HD double multiply_subtract(double a, double b, double c) { return a * b - c; }
HDROPS_HD float round_to_even(float x) { return rintf(x); }
HDROPS_HD double round_to_even(double x) { return rint(x); }

// Linear: the segment and how far in it. Nearest: the level.
template <bool Linear, class T>
HDROPS_HD CurvePosition<T> locate_on_curve(T x, T last) {
  T clamped = clamp_to_unit(x), position = clamped * last;
  if constexpr (Linear) {
    int32_t index = int32_t(position);
    return {index, multiply_subtract(clamped, last, T(index))};
  } else {
    return {int32_t(round_to_even(position)), T(0)};
  }
}

// Rise of the curve from level i to the next.
template <class T>
HDROPS_HD T segment_delta(const T* curve, int64_t levels, int64_t i) {
  return i + 1 < levels ? curve[i + 1] - curve[i] : T(0);
}

// dy/dx in segment i.
template <class T>
HDROPS_HD T linear_slope(const T* curve, int64_t levels, int64_t i) {
  return segment_delta(curve, levels, i) * T(levels - 1);
}

// The finite difference of OP-8 at level i, for gradient_scale 1.
template <class T>
HDROPS_HD T nearest_slope(const T* curve, int64_t i) {
  return i > 0 ? curve[i] - curve[i - 1] : curve[0];
}

// dL/dc[i] from the sums over a curve's pixels: of g per segment, and of g * f (linear: sums [levels, 2]).
template <class T>
HDROPS_HD T linear_curve_gradient(const T* sums, int64_t levels, int64_t i) {
  T here = i + 1 < levels ? sums[2 * i] - sums[2 * i + 1] : sums[2 * i];
  return i > 0 ? here + sums[2 * (i - 1) + 1] : here;
}

}  // namespace hdrops
