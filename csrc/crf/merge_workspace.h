// Scratch memory of one thread that merges exposures, B elements (a block) at a time.
#pragma once
#include "common/memory.h"
#include "crf/merge_params.h"

namespace hdrops {

template <class T, class A>
class MergeWorkspace {
 public:
  // `bins`: sums kept for the gradients of one stream's curve and exposure times.
  MergeWorkspace(int64_t frames, int64_t block, int64_t bins)
      : pointers_(4 * frames),
        tied_(frames * block),
        shares_(3 * frames * block),
        sums_(6 * block + frames + 64),
        indices_(3 * block + frames),
        bins_(bins + 1) {
    row = reinterpret_cast<const T**>(pointers_.get());
    ordered_row = reinterpret_cast<const T**>(pointers_.get() + frames);
    share = reinterpret_cast<const A**>(pointers_.get() + 2 * frames);
    ordered_share = reinterpret_cast<const A**>(pointers_.get() + 3 * frames);
    tied_reading = tied_.get();
    share_block = shares_.get();
    tied_share = shares_.get() + frames * block;
    weight_sum = sums_.get();
    value_sum = weight_sum + block;
    log_radiance = value_sum + block;
    gain = log_radiance + block;
    darkest = gain + block;
    brightest = darkest + block;
    fraction = brightest + block;
    rank = indices_.get();
    curve_offset = rank + frames;
    code_offset = curve_offset + block;
    bin = bins_.get();
  }

  // Frames in order of exposure, from the block's first element: readings, and their shares by mask (if any).
  const T** row;
  const A** share;
  // The same with frames of equal exposure sorted by reading, element by element.
  const T** ordered_row;
  const A** ordered_share;
  T* tied_reading;        // [P, B], what ordered_row points to where exposures are equal
  A* share_block;         // [P, B]
  A* tied_share;          // [P, B]
  A* weight_sum;          // [B]
  A* value_sum;           // [B], of w (ln g - ln t)
  A* log_radiance;        // [B]
  A* gain;                // [B], of the backward pass
  A* darkest;             // [B], ln g of code 0 in each element's channel
  A* brightest;           // [B], and of code 255
  A* fraction;            // [P], of one element: d ln E / d (ln g - ln t) of each frame
  int32_t* rank;          // [P]
  int32_t* curve_offset;  // [B], of each element's channel in an interleaved stream
  int32_t* code_offset;   // [B]
  double* bin;

 private:
  Scratch<const void*> pointers_;
  Scratch<T> tied_;
  Scratch<A> shares_, sums_;
  Scratch<int32_t> indices_;
  Scratch<double> bins_;
};

}  // namespace hdrops
