// The sampling plan of a patch of output pixels: for one tap and up to a few runs of channels, where each pixel samples
// and what the corners weigh, the mask included. Computed once for all channels, and kept in shared memory.
#pragma once
#include "deform_conv2d/samples_cuda.cuh"

namespace hdrops::deform_conv2d {

constexpr int kPatchPixels = 128;

// Output pixels of one image: kPatchPixels in rows of 2^log2_width, so that their samples lie near each other. Pixels
// beyond the image's border exist in the patch only.
struct PixelPatch {
  int image, first_row, first_column;
  int log2_width;

  __device__ __forceinline__ int row(int pixel) const { return first_row + (pixel >> log2_width); }
  __device__ __forceinline__ int column(int pixel) const { return first_column + (pixel & ((1 << log2_width) - 1)); }
};

// How an image's vectors lie: run `r` at r * run_stride, in it pixels pixel_stride elements apart.
struct ImageStrides {
  int64_t image, run, row, pixel;
};

// A bilinear sample as the gather wants it. `place` holds four times the position of the cell's low corner in its run,
// in elements, plus 1 if the corners to the right lie a pixel further (else the cell is cut by the border and they
// coincide), plus 2 if the lower ones lie a row further; it is negative if nothing is sampled.
template <class Real>
struct SamplePlan {
  Vector<Real, 4>* weights;  // [run][pixel], of the corners 00, 01, 10, 11
  int64_t* places;

  HDROPS_HD static constexpr size_t bytes(int runs) {
    return size_t(runs) * kPatchPixels * (4 * sizeof(Real) + sizeof(int64_t));
  }
  __device__ __forceinline__ static SamplePlan in(void* memory, int runs) {
    auto* weights = static_cast<Vector<Real, 4>*>(memory);
    return {weights, reinterpret_cast<int64_t*>(weights + runs * kPatchPixels)};
  }
};

// Offset and mask of a pixel, on their way from memory.
template <class Real>
struct Site {
  Real dy, dx, mask;
};

// The integer that sampling.h pairs with a real type.
template <class Real>
struct CellIndex {
  using type = int32_t;
};
template <>
struct CellIndex<double> {
  using type = int64_t;
};

// The pixel of a patch whose samples a thread prepares.
template <class T>
struct SitePixel {
  using Real = device_acc_t<T>;
  bool exists;
  int64_t at;  // within the output's plane
  Real y, x;   // where tap (0, 0) of an unshifted kernel lies

  __device__ __forceinline__ static SitePixel of(const SampleSource<T>& s, const PixelPatch& patch, int pixel) {
    int64_t row = patch.row(pixel), column = patch.column(pixel);
    return {row < s.out_height && column < s.out_width, row * s.out_width + column, Real(row * s.stride_h - s.pad_h),
            Real(column * s.stride_w - s.pad_w)};
  }

  __device__ __forceinline__ Site<Real> load(const SampleSource<T>& s, int64_t image, int64_t offset_group,
                                             int tap) const {
    if (!exists) return {};
    int64_t plane = sample_plane(s, image, offset_group, tap);
    return {load_as_of<T, Real>(s.offset, s.offset_is_float, 2 * plane + at),
            load_as_of<T, Real>(s.offset, s.offset_is_float, 2 * plane + s.out_pixels + at),
            s.mask == nullptr ? Real(1) : load_as_of<T, Real>(s.mask, s.mask_is_float, plane + at)};
  }

  __device__ __forceinline__ void write(const SampleSource<T>& s, const ImageStrides& strides, int tap,
                                        const Site<Real>& site, const SamplePlan<Real>& plan, int index) const {
    Real position_y = site.dy + (y + Real(tap / s.kernel_w * s.dilation_h));
    Real position_x = site.dx + (x + Real(tap % s.kernel_w * s.dilation_w));
    if (!exists || !inside_grid(position_y, Real(s.height)) || !inside_grid(position_x, Real(s.width))) {
      plan.weights[index] = {};
      plan.places[index] = -1;
      return;
    }
    using Cell = typename CellIndex<Real>::type;
    AxisSample<Real, Cell> vertical = sample_axis<Real, Cell>(position_y, s.height);
    AxisSample<Real, Cell> horizontal = sample_axis<Real, Cell>(position_x, s.width);
    Real low = site.mask * vertical.weight_low, high = site.mask * vertical.weight_high;
    plan.weights[index] = {{low * horizontal.weight_low, low * horizontal.weight_high, high * horizontal.weight_low,
                            high * horizontal.weight_high}};
    int64_t first = vertical.low * strides.row + horizontal.low * strides.pixel;
    plan.places[index] =
        first * 4 + (vertical.low != vertical.high ? 2 : 0) + (horizontal.low != horizontal.high ? 1 : 0);
  }
};

// One vector of channels at the four corners of a sample. Kept in words until it is interpolated: 16-bit values would
// take a register each.
template <class T>
struct Corners {
  static constexpr int kVector = kVector16<T>;
  using Words = Vector<uint32_t, 4>;
  Words of[4];

  // `image` points at the vector in the image's first pixel.
  __device__ __forceinline__ static Corners load(const T* image, const ImageStrides& strides, int64_t place) {
    Corners corners{};
    if (place < 0) return corners;
    const T* first = image + (place >> 2);
    int64_t right = place & 1 ? strides.pixel : 0, down = place & 2 ? strides.row : 0;
    corners.of[0] = load_global(reinterpret_cast<const Words*>(first));
    corners.of[1] = load_global(reinterpret_cast<const Words*>(first + right));
    corners.of[2] = load_global(reinterpret_cast<const Words*>(first + down));
    corners.of[3] = load_global(reinterpret_cast<const Words*>(first + down + right));
    return corners;
  }

  __device__ __forceinline__ void interpolate(const Vector<device_acc_t<T>, 4>& weights,
                                              device_acc_t<T> (&values)[kVector]) const {
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] = 0;
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      union {
        Words words;
        Vector<T, kVector> vector;
      } loaded = {of[corner]};
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[i] += weights.value[corner] * load_as(loaded.vector.value[i]);
    }
  }
};

}  // namespace hdrops::deform_conv2d
