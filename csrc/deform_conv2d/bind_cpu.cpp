// Binds the CPU kernels of deform_conv2d: the checks memory safety rests on, allocation, layouts, dtype dispatch.
//
// A contiguous input gives a contiguous output; an input that is channels last and not contiguous gives a channels-last
// output and input gradient, and is used in place; any other input is made contiguous first. The other tensors are made
// contiguous where they are not. The CPU kernels are deterministic, so `deterministic` has nothing to ask of them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/layout.h"
#include "common/memory.h"
#include "deform_conv2d/params.h"

namespace hdrops::deform_conv2d {
namespace {

using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;
using Pair = std::vector<int64_t>;

Tensor in_format(const Tensor& tensor, bool channels_last) {
  return torch::stable::contiguous(tensor, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

Tensor allocate(const Tensor& like, ScalarType dtype, const std::vector<int64_t>& shape, bool channels_last = false) {
  Tensor tensor = torch::stable::empty(shape, dtype, std::nullopt, like.device(), std::nullopt,
                                       channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  advise_huge_pages(tensor.mutable_data_ptr(), size_t(tensor.numel()) * tensor.element_size());
  return tensor;
}

void check_shape(const Tensor& tensor, const char* name, const std::vector<int64_t>& shape) {
  bool same = tensor.dim() == int64_t(shape.size());
  for (int64_t dim = 0; same && dim < tensor.dim(); ++dim) same = tensor.size(dim) == shape[size_t(dim)];
  std::ostringstream wanted, got;
  for (int64_t size : shape) wanted << " " << size;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) got << " " << tensor.size(dim);
  HDROPS_CHECK(same, "deform_conv2d: ", name, " must have shape [", wanted.str(), " ], got [", got.str(), " ]");
}

void check_dtype(const Tensor& tensor, const char* name, ScalarType data, bool may_be_float) {
  ScalarType dtype = tensor.scalar_type();
  HDROPS_CHECK(dtype == data || (may_be_float && dtype == ScalarType::Float), "deform_conv2d: ", name,
               " must have the input's dtype", may_be_float ? " or float32" : "", ", got scalar type ", int(dtype));
  HDROPS_CHECK(tensor.is_cpu(), "deform_conv2d: ", name, " must be on the CPU like the input");
}

// Checks everything but bias and grad_output, and fills in the sizes.
Params describe(const Tensor& input, const Tensor& offset, const Tensor& weight, const std::optional<Tensor>& mask,
                const Pair& stride, const Pair& padding, const Pair& dilation) {
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
  p.out_height = (p.height + 2 * p.pad_h - p.dilation_h * (p.kernel_h - 1) - 1) / p.stride_h + 1;
  p.out_width = (p.width + 2 * p.pad_w - p.dilation_w * (p.kernel_w - 1) - 1) / p.stride_w + 1;
  HDROPS_CHECK(p.height + 2 * p.pad_h > p.dilation_h * (p.kernel_h - 1) &&
                   p.width + 2 * p.pad_w > p.dilation_w * (p.kernel_w - 1),
               "deform_conv2d: the kernel is larger than the padded input");
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
  check_dtype(input, "input", data, false);
  check_dtype(weight, "weight", data, false);
  check_dtype(offset, "offset", data, half);
  if (mask) check_dtype(*mask, "mask", data, half);
  p.channels_last = is_channels_last(input);
  p.offset_is_float = offset.scalar_type() == ScalarType::Float;
  p.mask_is_float = mask && mask->scalar_type() == ScalarType::Float;
  return p;
}

Tensor forward(const Tensor& input, const Tensor& offset, const Tensor& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& mask, const Pair& stride, const Pair& padding, const Pair& dilation) {
  Params p = describe(input, offset, weight, mask, stride, padding, dilation);
  if (bias) {
    check_shape(*bias, "bias", {p.out_channels});
    check_dtype(*bias, "bias", input.scalar_type(), false);
  }
  Tensor output =
      allocate(input, input.scalar_type(), {p.batch, p.out_channels, p.out_height, p.out_width}, p.channels_last);
  if (output.numel() == 0) return output;
  Tensor dense_input = in_format(input, p.channels_last), dense_offset = in_format(offset, false);
  Tensor dense_weight = in_format(weight, false);
  std::optional<Tensor> dense_mask, dense_bias;
  if (mask) dense_mask = in_format(*mask, false);
  if (bias) dense_bias = in_format(*bias, false);
  p.input = dense_input.const_data_ptr();
  p.offset = dense_offset.const_data_ptr();
  p.weight = dense_weight.const_data_ptr();
  p.mask = dense_mask ? dense_mask->const_data_ptr() : nullptr;
  p.bias = dense_bias ? dense_bias->const_data_ptr() : nullptr;
  p.output = output.mutable_data_ptr();
  dispatch_floating(input.scalar_type(), "deform_conv2d", [&]<class T>() { forward_cpu<T>(p); });
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input,
                                                            const Tensor& offset, const Tensor& weight,
                                                            const std::optional<Tensor>& mask, const Pair& stride,
                                                            const Pair& padding, const Pair& dilation,
                                                            const std::vector<bool>& output_mask,
                                                            bool /*deterministic*/) {
  Params p = describe(input, offset, weight, mask, stride, padding, dilation);
  check_shape(grad_output, "grad_output", {p.batch, p.out_channels, p.out_height, p.out_width});
  check_dtype(grad_output, "grad_output", input.scalar_type(), false);
  HDROPS_CHECK(output_mask.size() == 5, "deform_conv2d: output_mask must have 5 entries, got ", output_mask.size());
  ScalarType dtype = input.scalar_type();
  auto gradient = [&](bool wanted, const Tensor& of, ScalarType type, bool channels_last = false) {
    std::vector<int64_t> shape{0};
    if (wanted) shape.assign(of.sizes().begin(), of.sizes().end());
    return allocate(input, type, shape, wanted && channels_last);
  };
  Tensor grad_input = gradient(output_mask[0], input, dtype, p.channels_last);
  Tensor grad_offset = gradient(output_mask[1], offset, offset.scalar_type());
  Tensor grad_weight = gradient(output_mask[2], weight, dtype);
  Tensor grad_bias = allocate(input, dtype, {output_mask[3] ? p.out_channels : 0});
  bool mask_wanted = output_mask[4] && mask;
  Tensor grad_mask = gradient(mask_wanted, mask_wanted ? *mask : input, mask_wanted ? mask->scalar_type() : dtype);

  Tensor dense_grad = in_format(grad_output, p.channels_last), dense_input = in_format(input, p.channels_last);
  Tensor dense_offset = in_format(offset, false), dense_weight = in_format(weight, false);
  std::optional<Tensor> dense_mask;
  if (mask) dense_mask = in_format(*mask, false);
  p.grad_output = dense_grad.const_data_ptr();
  p.input = dense_input.const_data_ptr();
  p.offset = dense_offset.const_data_ptr();
  p.weight = dense_weight.const_data_ptr();
  p.mask = dense_mask ? dense_mask->const_data_ptr() : nullptr;
  p.grad_input = output_mask[0] ? grad_input.mutable_data_ptr() : nullptr;
  p.grad_offset = output_mask[1] ? grad_offset.mutable_data_ptr() : nullptr;
  p.grad_weight = output_mask[2] ? grad_weight.mutable_data_ptr() : nullptr;
  p.grad_bias = output_mask[3] ? grad_bias.mutable_data_ptr() : nullptr;
  p.grad_mask = mask_wanted ? grad_mask.mutable_data_ptr() : nullptr;
  dispatch_floating(dtype, "deform_conv2d", [&]<class T>() { backward_cpu<T>(p); });
  return {grad_input, grad_offset, grad_weight, grad_bias, grad_mask};
}

}  // namespace
}  // namespace hdrops::deform_conv2d

STABLE_TORCH_LIBRARY_IMPL(hdrops, CPU, m) {
  m.impl("deform_conv2d", TORCH_BOX(&hdrops::deform_conv2d::forward));
  m.impl("_deform_conv2d_backward", TORCH_BOX(&hdrops::deform_conv2d::backward));
}
