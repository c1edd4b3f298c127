// Scratch memory of one thread that runs the truncation process: the last rows of every intermediate image.
#pragma once
#include "common/memory.h"
#include "crf/truncate_params.h"

namespace hdrops {

// The most recent rows of an image, found by their number.
struct RowRing {
  double* data;
  int64_t row_size, capacity;
  int64_t next;  // the first row not computed yet

  double* row(int64_t y) const { return data + y % capacity * row_size; }
};

class TruncateWorkspace {
 public:
  explicit TruncateWorkspace(const TruncateParams& p)
      : rings_(kRings * (4 * p.radius + 2) * p.row()),
        columns_(2 * (p.width + 4 * p.radius) * p.step),
        sums_(2 * (p.width + 2 * p.radius) * p.step),
        rows_(3 * (2 * p.radius + 1)) {
    int64_t capacity = 4 * p.radius + 2;
    RowRing* rings[] = {&image,      &slope,      &shift,  &mean,      &inverse,
                        &grad_slope, &grad_shift, &direct, &grad_mean, &grad_square};
    for (int k = 0; k < kRings; ++k) *rings[k] = {rings_.get() + k * capacity * p.row(), p.row(), capacity, 0};
    first_columns = columns_.get();
    second_columns = first_columns + (p.width + 4 * p.radius) * p.step;
    first_sums = sums_.get();
    second_sums = first_sums + (p.width + 2 * p.radius) * p.step;
    rows = rows_.get();
  }

  RowRing image, slope, shift, mean, inverse;  // H, a, b, m, 1 / (v + eps)
  RowRing grad_slope, grad_shift, direct;      // of box(a), of box(b), and what reaches H without a box
  RowRing grad_mean, grad_square;              // of m, of box(H^2)
  double *first_columns, *second_columns;      // [(2 radius + width + 2 radius) * step]
  double *first_sums, *second_sums;            // [(radius + width + radius) * step]
  const double** rows;                         // of a box, with repeats

 private:
  static constexpr int kRings = 10;
  Scratch<double> rings_, columns_, sums_;
  Scratch<const double*> rows_;
};

}  // namespace hdrops
