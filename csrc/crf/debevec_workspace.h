// Scratch memory of one thread that solves systems of few samples.
#pragma once
#include "common/memory.h"
#include "crf/debevec_params.h"

namespace hdrops {

class DebevecWorkspace {
 public:
  explicit DebevecWorkspace(const DebevecParams& p)
      : pitch((p.samples + 8) / 8 * 8), memory_(3 * p.levels + (p.levels + p.samples) * pitch) {
    diagonal = memory_.get() + (p.levels + p.samples) * pitch;
    beside = diagonal + p.levels;
    beyond = beside + p.levels;
    codes_ = memory_.get();
    samples_ = codes_ + p.levels * pitch;
  }

  // Of m_1 .. m_S and the right side, at one code; then of T^-1 times them.
  double* code_row(int64_t code) const { return codes_ + code * pitch; }
  // Of the system that is left for the samples, and its right side.
  double* sample_row(int64_t sample) const { return samples_ + sample * pitch; }

  // Of a row of samples + 1 numbers: whole vectors of any instruction set.
  const int64_t pitch;
  double *diagonal, *beside, *beyond;  // the bands of T, at the distances 0, 1 and 2; then of its factor

 private:
  Scratch<double> memory_;
  double *codes_, *samples_;
};

}  // namespace hdrops
