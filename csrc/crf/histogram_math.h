// The mathematics of the histogram kernels, one value at a time: tents (OP-11) and the value-weighted histogram
// (OP-12).
#pragma once
#include <cmath>

#include "common/hd.h"

namespace hdrops {

HDROPS_HD float floor_of(float x) { return floorf(x); }
HDROPS_HD double floor_of(double x) { return floor(x); }

// relu(1 - |scale * x - centre|); NaN stays NaN.
template <class A>
HDROPS_HD A tent_height(A x, A scale, A centre) {
  A distance = scale * x - centre, height = A(1) - (distance < A(0) ? -distance : distance);
  return height < A(0) ? A(0) : height;
}

// What the set of tents of one scale adds to dL/dx, where grad(i) is dL/d(tent i): x lies on the flanks of two
// neighbours, falling from the left one and rising to the right one; on a peak the slope is 0.
template <class A, class Grad>
HDROPS_HD A tent_set_slope(A x, int64_t scale, const Grad& grad) {
  A position = A(scale) * x, sum = 0;
  if (!(position > A(-1) && position < A(scale) + A(1))) return sum;
  A floor = floor_of(position);
  if (position == floor) return sum;
  int64_t left = int64_t(floor);
  if (left >= 0) sum -= A(scale) * grad(left);
  if (left < scale) sum += A(scale) * grad(left + 1);
  return sum;
}

// Where a pixel of [-1, 1] lies among the bins; a NaN lies at 0.
HDROPS_HD float bin_position(float x, int64_t bins) {
  return fminf(fmaxf((x + 1.0f) * (float(bins - 1) / 2), 0.0f), float(bins - 1));
}
HDROPS_HD double bin_position(double x, int64_t bins) {
  return fmin(fmax((x + 1.0) * (double(bins - 1) / 2), 0.0), double(bins - 1));
}

// Bin l from the sum of the positions that fall in it.
HDROPS_HD double value_bin(double sum, int64_t bin, int64_t bins) {
  return sum / (double(bins - 1) * double(bin > 0 ? bin : 1));
}

// dL/dx of a pixel of bin l.
template <class A>
HDROPS_HD A value_slope(A grad, int64_t bin) {
  return grad / A(2 * (bin > 0 ? bin : 1));
}

}  // namespace hdrops
