// What the CUDA kernels of deform_conv2d share: how channels lie in memory, and where samples come from.
//
// Weight groups and offset groups cut the channels into runs of gcd(C / groups, C / offset_groups). In the kernels'
// layouts each run is padded by zeros to whole 16-byte vectors: a vector then belongs to one weight group and one
// offset group, and either group is a range of whole vectors.
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
  int64_t count() const { return total / padded; }
  HDROPS_HD int64_t position(int64_t channel) const { return channel / run * padded + channel % run; }
};

inline int64_t greatest_common_divisor(int64_t a, int64_t b) { return b == 0 ? a : greatest_common_divisor(b, a % b); }

template <class T>
Runs input_runs(const Params& p) {
  int64_t run = greatest_common_divisor(p.in_channels / p.groups, p.in_channels / p.offset_groups);
  return Runs::of(run, p.in_channels / run, kVector16<T>);
}

// What samples are made from.
template <class T>
struct SampleSource {
  int64_t out_pixels, taps;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int height, width, out_height, out_width, kernel_w;
  int64_t offset_groups;
  bool offset_is_float, mask_is_float;
  const void *offset, *mask;

  static SampleSource of(const Params& p) {
    return {p.out_pixels(),  p.taps(),        p.stride_h,        p.stride_w,      p.pad_h,           p.pad_w,
            p.dilation_h,    p.dilation_w,    int(p.height),     int(p.width),    int(p.out_height), int(p.out_width),
            int(p.kernel_w), p.offset_groups, p.offset_is_float, p.mask_is_float, p.offset,          p.mask};
  }
};

// An element of a tensor of T, or of the sums' type.
template <class T, class Real>
__device__ __forceinline__ Real load_as_of(const void* tensor, bool is_real, int64_t at) {
  return is_real ? static_cast<const Real*>(tensor)[at] : Real(load_as(static_cast<const T*>(tensor)[at]));
}

// Position in `mask` of an image's first pixel, and half of that of its dy in `offset`.
template <class T>
__device__ __forceinline__ int64_t sample_plane(const SampleSource<T>& s, int64_t image, int64_t offset_group,
                                                int tap) {
  return ((image * s.offset_groups + offset_group) * s.taps + tap) * s.out_pixels;
}

}  // namespace hdrops::deform_conv2d
