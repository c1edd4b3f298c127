// The mathematics of exposure merging (OP-10), one value at a time.
#pragma once
#include "common/hd.h"
#include "crf/merge_params.h"

namespace hdrops {

// A response that is not positive counts as the smallest one.
template <class A>
HDROPS_HD A positive_response(A entry) {
  return entry > 0 ? entry : A(kSmallestResponse);
}

// Where a table of `length` entries is read for an 8-bit code: at its own entry if it has one for each, else between
// two.
struct CodePlace {
  int64_t lower, upper;
  double fraction;
};

HDROPS_HD CodePlace place_of_code(int code, int64_t length) {
  double position = length == kCodes8 ? double(code) : double(code) / (kCodes8 - 1) * double(length - 1);
  int64_t lower = int64_t(position) < length - 1 ? int64_t(position) : length - 1;
  int64_t upper = lower + 1 < length ? lower + 1 : lower;
  return {lower, upper, position - double(lower)};
}

HDROPS_HD double between(double lower, double upper, double fraction) {
  return fraction > 0 ? (1 - fraction) * lower + fraction * upper : lower;  // without a fraction, upper may be infinite
}

// Whether reading a comes after b among frames of one exposure: NaN last, then by share.
template <class A>
HDROPS_HD bool comes_after(A a, A b, A share_a, A share_b) {
  if (b != b) return a != a && share_a > share_b;
  if (a != a) return true;
  return a > b || (a == b && share_a > share_b);
}

// The share a mask's value leaves a pixel: a boolean one (bytes of 0 and 1) excludes, another weighs, none below 0 and
// none NaN.
template <class A>
HDROPS_HD A share_of_value(uint8_t excluded) {
  return excluded ? A(0) : A(1);
}
template <class A>
HDROPS_HD A share_of_value(A weight) {
  return weight > 0 ? weight : A(0);
}

}  // namespace hdrops
