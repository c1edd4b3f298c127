// What the blocks of the two backward kernels share: the samples of a tile of pixels.
//
// They read channels last, input and grad_output alike: pixels of whole 16-byte vectors, in the runs of
// samples_cuda.cuh; an output's run is a weight group.
#pragma once
#include "deform_conv2d/samples_cuda.cuh"

namespace hdrops::deform_conv2d {

template <class T>
Runs output_runs(const Params& p) {
  return Runs::of(p.out_channels / p.groups, p.groups, kVector16<T>);
}

// Consecutive output pixels of one image, from `first` on, which lies at (row, column).
struct PixelTile {
  int64_t first;
  int image, count, row, column;

  template <class T>
  __device__ __forceinline__ static PixelTile at(const SampleSource<T>& s, int image, int64_t first, int most) {
    int64_t row = first / s.out_width, left = s.out_pixels - first;
    return {first, image, left < most ? int(left) : most, int(row), int(first - row * s.out_width)};
  }
};

// A sample. It lies in the cell whose upper left corner is (row, column), either of which may be -1. A tile of kPixels
// pixels has, for one tap and some offset groups, an array of them in shared memory, [offset group][pixel].
template <class Real>
struct Sample {
  static constexpr int kOutside = INT32_MIN;  // the row of a sample that reads nothing
  Real fraction_y, fraction_x, mask;
  int row, column;
};

// To an element of a tensor of T, or of the sums' type.
template <class T, class Real>
__device__ __forceinline__ void store_as_of(Real value, void* tensor, bool is_real, int64_t at) {
  if (is_real) {
    static_cast<Real*>(tensor)[at] = value;
  } else {
    static_cast<T*>(tensor)[at] = store_as<T>(value);
  }
}

// All threads together write the samples of `count` offset groups from `first_group` on.
template <class T, class Real, int kPixels, int kThreads>
__device__ __forceinline__ void write_samples(const SampleSource<T>& s, const PixelTile& tile, int tap, int first_group,
                                              int count, Sample<Real>* samples) {
  for (int i = threadIdx.x; i < count * kPixels; i += kThreads) {
    int pixel = i % kPixels;
    samples[i] = {0, 0, 0, Sample<Real>::kOutside, 0};
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
    Real mask = s.mask == nullptr ? Real(1) : load_as_of<T, Real>(s.mask, s.mask_is_float, plane + at);
    samples[i] = {y - row, x - column, mask, int(row), int(column)};
  }
}

// The cell of one sample: which of its corners exist, and where the first lies in the image's pixels.
struct Cell {
  bool top, bottom, left, right;  // rows `row`, `row + 1` and columns `column`, `column + 1` are of the image
  int64_t pixel;

  // The sample must count.
  template <class T, class Real>
  __device__ __forceinline__ static Cell of(const SampleSource<T>& s, const Sample<Real>& sample) {
    return {sample.row >= 0, sample.row + 1 < s.height, sample.column >= 0, sample.column + 1 < s.width,
            int64_t(sample.row) * s.width + sample.column};
  }
};

// One 16-byte vector of channels at the four corners of a cell, zeros where a corner does not exist. Kept in words
// until it is used: 16-bit values would take a register each.
template <class T>
struct CellVectors {
  using Words = Vector<uint32_t, 4>;
  Words of[4];

  // `image` points at the vector in the image's first pixel.
  __device__ __forceinline__ static CellVectors load(const T* image, int pixel_stride, int64_t row_stride,
                                                     const Cell& cell) {
    CellVectors vectors{};
    const T* upper = image + cell.pixel * pixel_stride;
    const T* lower = upper + row_stride;
    if (cell.top && cell.left) vectors.of[0] = load_global(reinterpret_cast<const Words*>(upper));
    if (cell.top && cell.right) vectors.of[1] = load_global(reinterpret_cast<const Words*>(upper + pixel_stride));
    if (cell.bottom && cell.left) vectors.of[2] = load_global(reinterpret_cast<const Words*>(lower));
    if (cell.bottom && cell.right) vectors.of[3] = load_global(reinterpret_cast<const Words*>(lower + pixel_stride));
    return vectors;
  }
  __device__ __forceinline__ device_acc_t<T> value(int corner, int channel) const {
    union {
      Words words;
      Vector<T, kVector16<T>> vector;
    } loaded = {of[corner]};
    return load_as(loaded.vector.value[channel]);
  }
};

}  // namespace hdrops::deform_conv2d
