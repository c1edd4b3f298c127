// The truncation process (OP-14) on CUDA as stages, each of which makes one pixel of an intermediate image from a row
// or a column of the last. What runs them over a tile in shared memory is in truncate_tile_cuda.cuh, over whole images
// in truncate_staged_cuda.cuh.
//
//   forward                                           backward, the first four stages recomputed
//   row_moments      columns of  first, second        row_moments, guide, guide_sums
//   guide            rows                             base_gradient         gradient of the base, and past the boxes
//   guide_sums       columns                          base_gradient_sums    columns (transposed boxes)
//   base             rows                             moment_gradients      rows
//                                                     moment_gradient_sums  columns
//                                                     image_gradient        rows
//
// Everything is computed in the type that sums are kept in, float but for double data. In float E[H^2] - m^2 of bright
// pixels has no digits of eps left, and neither have the sums of H times a gradient of which it takes the difference
// later. So every sum over a box is of differences from a pixel: with `offset` = m - H at the centre of a box,
//
//   v(p)    = mean of (H - m(p))^2: per row about the row's mean, then of the row's means about the box's
//   dL/dv   = (sum of g (H - m(p))) * eps / (v + eps)^2            g: gradient of the base
//   dL/dH   = direct + sum over the boxes p of (g(p) eps / (v(p) + eps) + 2 (H - m(p)) dL/dv(p))
//
// and the differences between columns are added row by row, those between rows column by column. Sums are taken anew
// for every pixel: in a running sum what a bright pixel leaves behind would drown its dark neighbours.
#pragma once
#include <cfloat>

#include "common/device.cuh"
#include "crf/truncate_math.h"

namespace hdrops {

// How far the pixel is from both ends of its row or column.
struct Ends {
  int before, after;

  HDROPS_HD static Ends of(int64_t at, int64_t size) { return {clipped(at), clipped(size - 1 - at)}; }
  HDROPS_HD static int clipped(int64_t distance) {
    constexpr int64_t kFar = 1 << 29;  // further than a radius reaches in sums of two
    return int(distance < -kFar ? -kFar : distance > kFar ? kFar : distance);
  }

  // The place relative to the pixel that distance d from it is reflected to. |d| is below the size.
  HDROPS_HD int reflect(int d) const {
    if (d < -before) return -2 * before - d;
    return d > after ? 2 * after - d : d;
  }

  // Whether all boxes that reach over the pixel have it once.
  HDROPS_HD bool far_from(int radius) const { return before > radius && after > radius; }

  // How often the box around the pixel at distance d, |d| <= radius, has this pixel: 0 where there is none.
  HDROPS_HD int times_in_box(int d, int radius) const {
    if (d < -before || d > after) return 0;
    return 1 + (before > 0 && 2 * before + d <= radius) + (after > 0 && 2 * after - d <= radius);
  }
};

// The pixel at `here` and its neighbours along a row or a column, `step` apart. kReflect: what lies outside of the
// image is looked up inside, else it is there.
template <class Index, bool kReflect>
struct Line {
  Index here, step;
  Ends ends;

  __device__ __forceinline__ Index at(int d) const { return here + (kReflect ? ends.reflect(d) : d) * step; }
};

// The boxes' means of a and b.
template <class A>
struct GuideMeans {
  A slope, shift;
};

// The stages over buffers of the same shape. `Image` gives H by index. kRadius 0: `radius` tells.
template <int kRadius, bool kBackward, class A, class Image>
struct TruncateStages {
  static constexpr int kUnroll = kRadius > 0 ? 2 * kRadius + 1 : 1;

  Image image;
  A *first, *second;    // sums over rows
  A* slope;             // a; in the backward pass then g, then g eps / (v + eps) over the boxes
  A* shift;             // forward: b
  A *inverse, *offset;  // backward: 1 / (v + eps), then dL/dv; m - H
  int given_radius;
  A eps;

  __device__ __forceinline__ int radius() const { return kRadius > 0 ? kRadius : given_radius; }
  __device__ __forceinline__ A side() const { return A(2 * radius() + 1); }

  // The row's mean less the pixel, and the sum of squares about that mean.
  template <class L>
  __device__ __forceinline__ void row_moments(const L& row) const {
    const A centre = image(row.here);
    A sum = 0, squares = 0;
#pragma unroll(kUnroll)
    for (int d = -radius(); d <= radius(); ++d) sum += image(row.at(d)) - centre;
    const A mean = sum * (A(1) / side());
#pragma unroll(kUnroll)
    for (int d = -radius(); d <= radius(); ++d) {
      const A deviation = image(row.at(d)) - centre - mean;
      squares += deviation * deviation;
    }
    first[row.here] = mean;
    second[row.here] = squares;
  }

  template <class L>
  __device__ __forceinline__ void guide(const L& column) const {
    const A centre = image(column.here);
    A sum = 0, within = 0, between = 0;
#pragma unroll(kUnroll)
    for (int d = -radius(); d <= radius(); ++d) {
      sum += image(column.at(d)) - centre + first[column.at(d)];
      within += second[column.at(d)];
    }
    const A mean = sum * (A(1) / side());
#pragma unroll(kUnroll)
    for (int d = -radius(); d <= radius(); ++d) {
      const A deviation = image(column.at(d)) - centre + first[column.at(d)] - mean;
      between += deviation * deviation;
    }
    const A variance = (within + side() * between) * (A(1) / (side() * side())), reciprocal = A(1) / (variance + eps);
    slope[column.here] = variance * reciprocal;
    if constexpr (kBackward) {
      inverse[column.here] = reciprocal;
      offset[column.here] = mean;
    } else {
      shift[column.here] = eps * reciprocal * (centre + mean);
    }
  }

  template <class L>
  __device__ __forceinline__ void guide_sums(const L& row) const {
    A slopes = 0, shifts = 0;
#pragma unroll(kUnroll)
    for (int d = -radius(); d <= radius(); ++d) {
      const auto i = row.at(d);
      slopes += slope[i];
      if constexpr (kBackward) {
        shifts += eps * inverse[i] * (image(i) + offset[i]);
      } else {
        shifts += shift[i];
      }
    }
    first[row.here] = slopes;
    second[row.here] = shifts;
  }

  template <class L>
  __device__ __forceinline__ GuideMeans<A> guide_means(const L& column) const {
    GuideMeans<A> sums{0, 0};
#pragma unroll(kUnroll)
    for (int d = -radius(); d <= radius(); ++d) {
      sums.slope += first[column.at(d)];
      sums.shift += second[column.at(d)];
    }
    const A scale = A(1) / (side() * side());
    return {sums.slope * scale, sums.shift * scale};
  }

  // The result.
  template <class L>
  __device__ __forceinline__ A base(const L& column) const {
    const GuideMeans<A> means = guide_means(column);
    const A pixel = image(column.here);
    return limit_base(pixel, means.slope * pixel + means.shift);
  }

  // Leaves g in slope; gives the part of the input's gradient that goes through no box.
  template <class L>
  __device__ __forceinline__ A base_gradient(const L& column, A grad) const {
    const GuideMeans<A> means = guide_means(column);
    const A pixel = image(column.here);
    const LimitGradient<A> of = limit_gradient(grad, pixel, means.slope * pixel + means.shift);
    slope[column.here] = of.base;
    return of.image + of.base * means.slope;
  }

  // Calls add(at, times) of every pixel around which a box has this one.
  template <class L, class Add>
  __device__ __forceinline__ void for_boxes(const L& line, const Add& add) const {
    if (line.ends.far_from(radius())) {
#pragma unroll(kUnroll)
      for (int d = -radius(); d <= radius(); ++d) add(line.here + d * line.step, A(1));
    } else {
#pragma unroll(1)
      for (int d = -radius(); d <= radius(); ++d) {
        const int times = line.ends.times_in_box(d, radius());
        if (times > 0) add(line.here + d * line.step, A(times));
      }
    }
  }

  // Of g and of g (H - the pixel).
  template <class L>
  __device__ __forceinline__ void base_gradient_sums(const L& row) const {
    const A centre = image(row.here);
    A sum = 0, moment = 0;
    for_boxes(row, [&](auto i, A times) {
      sum += times * slope[i];
      moment += times * slope[i] * (image(i) - centre);
    });
    first[row.here] = sum;
    second[row.here] = moment;
  }

  // Leaves g eps / (v + eps) over the boxes in slope and dL/dv in inverse, both divided by the box's area.
  template <class L>
  __device__ __forceinline__ void moment_gradients(const L& column) const {
    const A centre = image(column.here), to_mean = offset[column.here];
    A sum = 0, moment = 0;
    for_boxes(column, [&](auto i, A times) {
      sum += times * first[i];
      moment += times * (second[i] + first[i] * (image(i) - centre - to_mean));
    });
    const A reciprocal = inverse[column.here], rest = eps * reciprocal, scale = A(1) / (side() * side());
    slope[column.here] = rest * sum * (scale * scale);
    inverse[column.here] = rest * reciprocal * moment * (scale * scale);
  }

  // Of dL/dv, and of what H's gradient has of each box at the row's own pixel.
  template <class L>
  __device__ __forceinline__ void moment_gradient_sums(const L& row) const {
    const A centre = image(row.here);
    A sum = 0, gradient = 0;
    for_boxes(row, [&](auto i, A times) {
      sum += times * inverse[i];
      gradient += times * (slope[i] + A(2) * inverse[i] * (centre - image(i) - offset[i]));
    });
    first[row.here] = sum;
    second[row.here] = gradient;
  }

  // What reaches the input through boxes.
  template <class L>
  __device__ __forceinline__ A image_gradient(const L& column) const {
    const A centre = image(column.here);
    A gradient = 0;
    for_boxes(column,
              [&](auto i, A times) { gradient += times * (second[i] + A(2) * first[i] * (centre - image(i))); });
    return gradient;
  }
};

// eps as the kernels take it: in range of the type, so that 1 / (v + eps) is finite and not 0 where v is 0.
template <class A>
HDROPS_HD A filter_eps(double eps) {
  constexpr double kLeast = sizeof(A) == 8 ? DBL_MIN : FLT_MIN, kMost = sizeof(A) == 8 ? DBL_MAX : FLT_MAX;
  return A(eps < kLeast ? kLeast : eps > kMost ? kMost : eps);
}

}  // namespace hdrops
