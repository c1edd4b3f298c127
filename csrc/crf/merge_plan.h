// Prepares exposure merging on the host: the order of the frames, the positive response, and the tables of 8-bit codes.
#pragma once
#include <cstdint>
#include <memory>

#include "common/memory.h"
#include "crf/merge_params.h"

namespace hdrops {

template <class A>
class MergePlan {
 public:
  // Fills what `params` leaves open: order, log_exposures, curve, hinge, and for 8-bit codes their tables.
  // log_exposures [exposure_images, P] and curve [curve_images, curve_channels, L] (or null) are the caller's.
  MergePlan(MergeParams<A>& params, const A* log_exposures, int64_t exposure_images, const A* curve,
            int64_t curve_images, int64_t curve_channels, bool codes8);

 private:
  void sort_frames(MergeParams<A>& params, const A* log_exposures, int64_t images);
  void make_positive(MergeParams<A>& params, const A* curve, int64_t images, int64_t channels);
  void tabulate(MergeParams<A>& params, int64_t curve_images, int64_t curve_channels);

  std::unique_ptr<Scratch<int32_t>> order_;
  std::unique_ptr<Scratch<A>> log_exposures_, curve_, log_curve_, code_weight_, table_;
};

// Elements of a block, the unit the kernels work on in cache: whole pixels of an interleaved stream.
int64_t merge_block_length(int64_t channels, bool interleaved);

// Tasks of at least `least` elements.
MergeTasks merge_tasks(int64_t batch, int64_t channels, int64_t pixels, bool interleaved, int64_t least);

}  // namespace hdrops
