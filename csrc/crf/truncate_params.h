// The truncation process (OP-14) as the kernels see it: planes of rows, each row of `width` pixels times `step`
// channels that lie side by side (1 for a contiguous image, C for a channels-last one).
#pragma once
#include <cstdint>

namespace hdrops {

constexpr double kSmallestBase = 1e-15;

struct TruncateParams {
  int64_t planes, height, width, step;
  int64_t radius;
  double eps;
  int64_t rows_per_task;

  int64_t row() const { return width * step; }
  int64_t tasks_per_plane() const { return (height + rows_per_task - 1) / rows_per_task; }
  int64_t tasks() const { return planes * tasks_per_plane(); }
};

}  // namespace hdrops
