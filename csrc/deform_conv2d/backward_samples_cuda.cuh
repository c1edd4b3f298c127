// What the blocks of the two backward kernels share: the channels-last layout they read, and the samples of a tile.
//
// Channels lie last in memory. Weight groups and offset groups cut them into runs of gcd(C / groups, C / offset_groups)
// channels, and each run is padded by zeros to whole 16-byte vectors: a vector then belongs to one weight group and one
// offset group, and either group is a range of whole vectors. Outputs lie likewise, a run being those of a weight group.
#pragma once
#include "common/device.cuh"
#include "common/sampling.h"
#include "deform_conv2d/params.h"

namespace hdrops::deform_conv2d {

// Channels in runs of `run`, each padded to `padded`; all in all `total`.
struct Runs {
  int64_t run, padded, total;

  static Runs of(int64_t run, int64_t count, int vector) {
    int64_t padded = round_up<int64_t>(run, vector);
    return {run, padded, padded * count};
  }
  bool has_padding() const { return run != padded; }
  HDROPS_HD int64_t position(int64_t channel) const { return channel / run * padded + channel % run; }
};

inline int64_t greatest_common_divisor(int64_t a, int64_t b) {
  return b == 0 ? a : greatest_common_divisor(b, a % b);
}

template <class T>
Runs input_runs(const Params& p) {
  int64_t run = greatest_common_divisor(p.in_channels / p.groups, p.in_channels / p.offset_groups);
  return Runs::of(run, p.in_channels / run, kVector16<T>);
}
template <class T>
Runs output_runs(const Params& p) {
  return Runs::of(p.out_channels / p.groups, p.groups, kVector16<T>);
}

// What samples are made from.
template <class T>
struct SampleSource {
  int64_t out_pixels;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int height, width, out_width, kernel_w, taps, offset_groups;
  bool offset_is_float, mask_is_float;
  const void *offset, *mask;

  static SampleSource of(const Params& p) {
    return {p.out_pixels(),    p.stride_h,     p.stride_w,      p.pad_h,           p.pad_w,
            p.dilation_h,      p.dilation_w,   int(p.height),   int(p.width),      int(p.out_width),
            int(p.kernel_w),   int(p.taps()),  int(p.offset_groups), p.offset_is_float, p.mask_is_float,
            p.offset,          p.mask};
  }
};

// Consecutive output pixels of one image, from `first` on, which lies at (row, column).
struct PixelTile {
  int64_t image, first;
  int count, row, column;

  template <class T>
  __device__ __forceinline__ static PixelTile at(const SampleSource<T>& s, int64_t image, int64_t first, int most) {
    int64_t row = first / s.out_width, left = s.out_pixels - first;
    return {image, first, left < most ? int(left) : most, int(row), int(first - row * s.out_width)};
  }
};

// The samples of a tile of kPixels pixels at one tap, for some offset groups: arrays in shared memory, offset group by
// offset group. A sample lies in the cell whose upper left corner is (row, column), either of which may be -1.
template <class Real, int kPixels>
struct Samples {
  static constexpr int kOutside = INT32_MIN;  // the row of a sample that reads nothing
  int *row, *column;
  Real *fraction_y, *fraction_x, *mask;

  static constexpr size_t bytes(int64_t offset_groups) {
    return size_t(offset_groups * kPixels) * (2 * sizeof(int) + 3 * sizeof(Real));
  }
  __device__ __forceinline__ static Samples in(void* memory, int offset_groups) {
    Real* reals = static_cast<Real*>(memory);
    int count = offset_groups * kPixels;
    int* integers = reinterpret_cast<int*>(reals + 3 * count);
    return {integers, integers + count, reals, reals + count, reals + 2 * count};
  }
};

template <class T, class Real>
__device__ __forceinline__ Real load_as_of(const void* tensor, bool is_real, int64_t at) {
  return is_real ? static_cast<const Real*>(tensor)[at] : Real(load_as(static_cast<const T*>(tensor)[at]));
}
template <class T, class Real>
__device__ __forceinline__ void store_as_of(Real value, void* tensor, bool is_real, int64_t at) {
  if (is_real) {
    static_cast<Real*>(tensor)[at] = value;
  } else {
    static_cast<T*>(tensor)[at] = store_as<T>(value);
  }
}

// Position in `mask` of an image's first pixel, and half of that of its dy in `offset`.
template <class T>
__device__ __forceinline__ int64_t sample_plane(const SampleSource<T>& s, int64_t image, int offset_group, int tap) {
  return ((image * s.offset_groups + offset_group) * s.taps + tap) * s.out_pixels;
}

// All threads together write the samples of `count` offset groups from `first_group` on.
template <class T, class Real, int kPixels, int kThreads>
__device__ __forceinline__ void write_samples(const SampleSource<T>& s, const PixelTile& tile, int tap,
                                              int first_group, int count, const Samples<Real, kPixels>& samples) {
  for (int i = threadIdx.x; i < count * kPixels; i += kThreads) {
    int pixel = i % kPixels;
    samples.row[i] = Samples<Real, kPixels>::kOutside;
    samples.column[i] = 0;
    samples.fraction_y[i] = samples.fraction_x[i] = samples.mask[i] = 0;
    if (pixel >= tile.count) continue;
    int64_t plane = sample_plane(s, tile.image, first_group + i / kPixels, tap), at = tile.first + pixel;
    unsigned column_on = unsigned(tile.column + pixel), rows_on = column_on / unsigned(s.out_width);
    int64_t out_row = tile.row + int64_t(rows_on), out_column = column_on - rows_on * unsigned(s.out_width);
    Real y = load_as_of<T, Real>(s.offset, s.offset_is_float, 2 * plane + at);
    Real x = load_as_of<T, Real>(s.offset, s.offset_is_float, 2 * plane + s.out_pixels + at);
    y += Real(out_row * s.stride_h - s.pad_h) + Real(tap / s.kernel_w * s.dilation_h);
    x += Real(out_column * s.stride_w - s.pad_w) + Real(tap % s.kernel_w * s.dilation_w);
    if (!inside_grid(y, Real(s.height)) || !inside_grid(x, Real(s.width))) continue;
    Real row = floor(y), column = floor(x);
    samples.row[i] = int(row);
    samples.column[i] = int(column);
    samples.fraction_y[i] = y - row;
    samples.fraction_x[i] = x - column;
    samples.mask[i] = s.mask == nullptr ? Real(1) : load_as_of<T, Real>(s.mask, s.mask_is_float, plane + at);
  }
}

// The cell of one sample: which of its corners exist, and where the first lies in the image's pixels.
struct Cell {
  bool top, bottom, left, right;  // rows `row`, `row + 1` and columns `column`, `column + 1` are of the image
  int64_t pixel;

  template <class T>
  __device__ __forceinline__ static Cell at(const SampleSource<T>& s, int row, int column) {
    bool counts = row >= -1;
    return {counts && row >= 0, counts && row + 1 < s.height, column >= 0, column + 1 < s.width,
            int64_t(row) * s.width + column};
  }
};

// Vectors of the four corners' channels, zeros where a corner does not exist; `image` points at the vector in the
// image's first pixel.
template <class T, int N>
__device__ __forceinline__ void load_corners(const T* image, int pixel_stride, int64_t row_stride, const Cell& cell,
                                             Vector<T, N> (&corner)[4]) {
  const T* first = image + cell.pixel * pixel_stride;
  const bool there[4] = {cell.top && cell.left, cell.top && cell.right, cell.bottom && cell.left,
                         cell.bottom && cell.right};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    corner[k] = {};
    const T* from = first + k / 2 * row_stride + k % 2 * pixel_stride;
    if (there[k]) corner[k] = load_global(reinterpret_cast<const Vector<T, N>*>(from));
  }
}

}  // namespace hdrops::deform_conv2d
