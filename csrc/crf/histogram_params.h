// What the histogram kernels are told: tent features (OP-11) and the value-weighted histogram (OP-12).
#pragma once
#include "crf/lookup_layout.h"

namespace hdrops {

// Tent maps of an image [n, c, p]: `tents` of them, tent k being relu(1 - |scale[k] * x - centre[k]|). The maps are
// [n, tents * c, p], channel k * c + channel; both tensors planar, or both interleaved (channels last).
struct TentParams {
  int64_t n, c, p, tents;
  bool interleaved;
  const int64_t* bins;  // bins[j] + 1 tents of scale bins[j], in order
  int64_t bin_count;
  const void* input;
  void* output;             // forward
  const void* grad_output;  // backward
  void* grad_input;
};

template <class T>
void tent_histogram_cpu(const TentParams& p);
template <class T>
void tent_histogram_backward_cpu(const TentParams& p);

// The histogram [n, c, bins] of an image [n, c, p]; every channel of every image is a curve of the layout.
struct ValueHistogramParams {
  CurveLayout layout;
  int64_t bins;
  const void* input;
  void* output;             // forward: [curves, bins]
  const void* grad_output;  // backward: [curves, bins]
  void* grad_input;
};

template <class T>
void value_histogram_cpu(const ValueHistogramParams& p);
template <class T>
void value_histogram_backward_cpu(const ValueHistogramParams& p);

}  // namespace hdrops
