// What a deformable convolution's kernels are told: sizes and pointers, nothing of torch.
//
// Tensors, contiguous unless said otherwise (K = kernel_h * kernel_w, P = out_height * out_width):
//   input, grad_input    [N, C, H, W]   channels last in memory if channels_last
//   output, grad_output  [N, O, P]      channels last in memory if channels_last
//   weight, grad_weight  [O, C / groups, K]
//   bias, grad_bias      [O]
//   offset, grad_offset  [N, offset_groups, K, 2, P]   (dy, dx)
//   mask, grad_mask      [N, offset_groups, K, P]
// All have the data's type T, but offset and mask (with their gradients) may be float where T is a 16-bit format.
#pragma once
#include <cstdint>

#include "common/hd.h"

namespace hdrops::deform_conv2d {

struct Params {
  int64_t batch, in_channels, height, width;
  int64_t out_channels, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t groups, offset_groups;
  bool channels_last;
  bool offset_is_float, mask_is_float;
  bool deterministic, allow_tf32;  // CUDA only: repeatable sums of grad_input; TensorFloat-32 products of floats

  const void* input;
  const void* offset;
  const void* weight;
  const void* mask;  // null: all ones
  const void* bias;  // null: zeros; forward only
  void* output;      // forward only

  // Backward only; a null gradient is not computed.
  const void* grad_output;
  void* grad_input;
  void* grad_offset;
  void* grad_weight;
  void* grad_bias;
  void* grad_mask;

  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t out_pixels() const { return out_height * out_width; }

  // Multiply-adds of a forward pass, a bilinear sample counted as 16.
  int64_t work() const { return batch * out_pixels() * taps() * in_channels * (out_channels / groups + 16); }
};

// The work a thread of the CPU kernels should have, in Params::work's unit: some 200 microseconds.
constexpr int64_t kWorkPerThread = int64_t(4) << 20;

// Whether the CPU kernels address an image of that many elements by 64-bit indices; HDROPS_INDEX_WIDTH=64 in the
// environment makes every size need them, so that tests reach that path without 2^31 elements.
bool needs_wide_index(int64_t image_elements);

// The CPU kernels; T is float, double, bfloat16 or float16.
template <class T>
void forward_cpu(const Params& params);
template <class T>
void backward_cpu(const Params& params);

}  // namespace hdrops::deform_conv2d
