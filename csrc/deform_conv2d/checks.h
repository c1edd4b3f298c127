// The checks of deform_conv2d's bindings that memory safety rests on, and the sizes of a call. The same for every
// device: the dispatcher has chosen the binding by some tensor's device, and all must be on the input's.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/layout.h"
#include "deform_conv2d/params.h"

namespace hdrops::deform_conv2d {

using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;
using Pair = std::vector<int64_t>;

inline void check_shape(const Tensor& tensor, const char* name, const std::vector<int64_t>& shape) {
  bool same = tensor.dim() == int64_t(shape.size());
  for (int64_t dim = 0; same && dim < tensor.dim(); ++dim) same = tensor.size(dim) == shape[size_t(dim)];
  std::ostringstream wanted, got;
  for (int64_t size : shape) wanted << " " << size;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) got << " " << tensor.size(dim);
  HDROPS_CHECK(same, "deform_conv2d: ", name, " must have shape [", wanted.str(), " ], got [", got.str(), " ]");
}

inline void check_tensor(const Tensor& tensor, const char* name, const Tensor& input, bool may_be_float = false) {
  ScalarType dtype = tensor.scalar_type();
  HDROPS_CHECK(dtype == input.scalar_type() || (may_be_float && dtype == ScalarType::Float), "deform_conv2d: ", name,
               " must have the input's dtype", may_be_float ? " or float32" : "", ", got scalar type ", int(dtype));
  HDROPS_CHECK(tensor.device() == input.device(), "deform_conv2d: ", name, " must be on the input's device");
}

// Checks everything but bias and grad_output, and fills in the sizes.
inline Params describe(const Tensor& input, const Tensor& offset, const Tensor& weight,
                       const std::optional<Tensor>& mask, const Pair& stride, const Pair& padding,
                       const Pair& dilation) {
  HDROPS_CHECK(input.dim() == 4 && offset.dim() == 4 && weight.dim() == 4,
               "deform_conv2d: input, offset and weight must have 4 dimensions, got ", input.dim(), ", ", offset.dim(),
               " and ", weight.dim());
  HDROPS_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
               "deform_conv2d: stride, padding and dilation must have 2 entries");
  Params p{};
  p.batch = input.size(0), p.in_channels = input.size(1), p.height = input.size(2), p.width = input.size(3);
  p.out_channels = weight.size(0), p.kernel_h = weight.size(2), p.kernel_w = weight.size(3);
  p.stride_h = stride[0], p.stride_w = stride[1], p.pad_h = padding[0], p.pad_w = padding[1];
  p.dilation_h = dilation[0], p.dilation_w = dilation[1];
  for (int64_t value : {p.stride_h, p.stride_w, p.dilation_h, p.dilation_w}) {
    HDROPS_CHECK(value > 0 && value <= INT32_MAX, "deform_conv2d: stride and dilation must be positive, got ", value);
  }
  for (int64_t value : {p.pad_h, p.pad_w}) {
    HDROPS_CHECK(value >= 0 && value <= INT32_MAX, "deform_conv2d: padding must not be negative, got ", value);
  }
  HDROPS_CHECK(p.kernel_h > 0 && p.kernel_w > 0 && p.out_channels > 0 && weight.size(1) > 0 && p.in_channels > 0,
               "deform_conv2d: the kernel and both channel counts must not be empty");
  HDROPS_CHECK(p.height > 0 && p.width > 0, "deform_conv2d: the input must have at least one row and column");
  HDROPS_CHECK(p.height <= INT32_MAX && p.width <= INT32_MAX && p.kernel_h <= INT32_MAX && p.kernel_w <= INT32_MAX,
               "deform_conv2d: height and width of input and kernel must be below 2^31");
  HDROPS_CHECK(p.batch <= INT32_MAX, "deform_conv2d: the batch must be below 2^31");
  p.out_height = (p.height + 2 * p.pad_h - p.dilation_h * (p.kernel_h - 1) - 1) / p.stride_h + 1;
  p.out_width = (p.width + 2 * p.pad_w - p.dilation_w * (p.kernel_w - 1) - 1) / p.stride_w + 1;
  HDROPS_CHECK(p.height + 2 * p.pad_h > p.dilation_h * (p.kernel_h - 1) &&
                   p.width + 2 * p.pad_w > p.dilation_w * (p.kernel_w - 1),
               "deform_conv2d: the kernel is larger than the padded input");
  HDROPS_CHECK(p.out_height <= INT32_MAX && p.out_width <= INT32_MAX,
               "deform_conv2d: height and width of the output must be below 2^31");
  HDROPS_CHECK(p.in_channels % weight.size(1) == 0, "deform_conv2d: weight.size(1) = ", weight.size(1),
               " must divide the input's ", p.in_channels, " channels");
  p.groups = p.in_channels / weight.size(1);
  HDROPS_CHECK(p.out_channels % p.groups == 0, "deform_conv2d: ", p.groups, " groups must divide the weight's ",
               p.out_channels, " output channels");
  p.offset_groups = offset.size(1) / (2 * p.taps());
  HDROPS_CHECK(p.offset_groups > 0 && p.in_channels % p.offset_groups == 0, "deform_conv2d: ", p.offset_groups,
               " offset groups must divide the input's ", p.in_channels, " channels");
  check_shape(offset, "offset", {p.batch, p.offset_groups * 2 * p.taps(), p.out_height, p.out_width});
  if (mask) check_shape(*mask, "mask", {p.batch, p.offset_groups * p.taps(), p.out_height, p.out_width});
  ScalarType data = input.scalar_type();
  bool half = data == ScalarType::BFloat16 || data == ScalarType::Half;
  check_tensor(weight, "weight", input);
  check_tensor(offset, "offset", input, half);
  if (mask) check_tensor(*mask, "mask", input, half);
  p.channels_last = is_channels_last(input);
  p.offset_is_float = offset.scalar_type() == ScalarType::Float;
  p.mask_is_float = mask && mask->scalar_type() == ScalarType::Float;
  return p;
}

inline void check_bias(const std::optional<Tensor>& bias, const Tensor& input, const Params& p) {
  if (!bias) return;
  check_shape(*bias, "bias", {p.out_channels});
  check_tensor(*bias, "bias", input);
}

inline void check_backward(const Tensor& grad_output, const Tensor& input, const std::vector<bool>& output_mask,
                           const Params& p) {
  check_shape(grad_output, "grad_output", {p.batch, p.out_channels, p.out_height, p.out_width});
  check_tensor(grad_output, "grad_output", input);
  HDROPS_CHECK(output_mask.size() == 5, "deform_conv2d: output_mask must have 5 entries, got ", output_mask.size());
}

}  // namespace hdrops::deform_conv2d
