// The least squares of Debevec and Malik, folded to the curve, for few samples (hdrops/camera/debevec.py): per system
//
//     (T - sum_i m_i m_i^T / d_i) g = right,      T = code counts + smoothness, of bandwidth two.
//
// An observation reads the curve at the code `lower`, or, with a fraction f, at lower and lower + 1 by 1 - f and f.
#pragma once
#include <cstdint>

namespace hdrops {

struct DebevecParams {
  int64_t systems, samples, frames, levels;
  const int64_t* lower;    // [systems, samples, frames]
  const double* fraction;  // the same, or null
  const double* square;    // the same: squared weights
  const double* strength;  // [levels]: of the second difference at each inner code
  const double* right;     // [systems, levels], summing to zero over the codes
  double* curve;           // [systems, levels], 0 at the middle code
  bool* solved;            // [systems]: false where the system is singular to rounding
};

void solve_few_samples_cpu(const DebevecParams& params);

}  // namespace hdrops
