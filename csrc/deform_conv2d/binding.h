// The two operators of deform_conv2d as torch calls them, for any device: checks (checks.h), allocation and layouts.
// bind_cpu.cpp and bind_cuda.cu say what a Device is:
//
//   Device(input)                            makes the input's device the current one as long as it lives
//   allocate(like, dtype, shape, channels_last)
//   forward<T>(params), backward<T>(params)  run the kernels
//
// A contiguous input gives a contiguous output; an input that is channels last and not contiguous gives a channels-last
// output and input gradient, and is used in place; any other input is made contiguous first. The other tensors are made
// contiguous where they are not.
#pragma once
#include <tuple>

#include "deform_conv2d/checks.h"

namespace hdrops::deform_conv2d {

inline Tensor in_format(const Tensor& tensor, bool channels_last) {
  return torch::stable::contiguous(tensor, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

inline const void* data_of(const std::optional<Tensor>& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

// The tensors that both directions read, dense; `params` points to them.
struct DenseInputs {
  Tensor input, offset, weight;
  std::optional<Tensor> mask;

  DenseInputs(Params& params, const Tensor& input_, const Tensor& offset_, const Tensor& weight_,
              const std::optional<Tensor>& mask_)
      : input(in_format(input_, params.channels_last)),
        offset(in_format(offset_, false)),
        weight(in_format(weight_, false)) {
    if (mask_) mask = in_format(*mask_, false);
    params.input = input.const_data_ptr();
    params.offset = offset.const_data_ptr();
    params.weight = weight.const_data_ptr();
    params.mask = data_of(mask);
  }
};

template <class Device>
Tensor forward(const Tensor& input, const Tensor& offset, const Tensor& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& mask, const Pair& stride, const Pair& padding, const Pair& dilation,
               bool allow_tf32) {
  Params p = describe(input, offset, weight, mask, stride, padding, dilation);
  check_bias(bias, input, p);
  p.allow_tf32 = allow_tf32;
  Device device(input);
  Tensor output = device.allocate(input, input.scalar_type(), {p.batch, p.out_channels, p.out_height, p.out_width},
                                  p.channels_last);
  if (output.numel() == 0) return output;
  DenseInputs dense(p, input, offset, weight, mask);
  std::optional<Tensor> dense_bias;
  if (bias) dense_bias = in_format(*bias, false);
  p.bias = data_of(dense_bias);
  p.output = output.mutable_data_ptr();
  dispatch_floating(input.scalar_type(), "deform_conv2d", [&]<class T>() { device.template forward<T>(p); });
  return output;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& input,
                                                            const Tensor& offset, const Tensor& weight,
                                                            const std::optional<Tensor>& mask, const Pair& stride,
                                                            const Pair& padding, const Pair& dilation,
                                                            const std::vector<bool>& output_mask, bool deterministic,
                                                            bool allow_tf32) {
  Params p = describe(input, offset, weight, mask, stride, padding, dilation);
  check_backward(grad_output, input, output_mask, p);
  p.deterministic = deterministic, p.allow_tf32 = allow_tf32;
  Device device(input);
  ScalarType dtype = input.scalar_type();
  auto gradient = [&](bool wanted, const Tensor& of, ScalarType type, bool channels_last = false) {
    std::vector<int64_t> shape{0};
    if (wanted) shape.assign(of.sizes().begin(), of.sizes().end());
    return device.allocate(input, type, shape, wanted && channels_last);
  };
  Tensor grad_input = gradient(output_mask[0], input, dtype, p.channels_last);
  Tensor grad_offset = gradient(output_mask[1], offset, offset.scalar_type());
  Tensor grad_weight = gradient(output_mask[2], weight, dtype);
  Tensor grad_bias = device.allocate(input, dtype, {output_mask[3] ? p.out_channels : 0}, false);
  bool mask_wanted = output_mask[4] && mask;
  Tensor grad_mask = gradient(mask_wanted, mask_wanted ? *mask : input, mask_wanted ? mask->scalar_type() : dtype);

  DenseInputs dense(p, input, offset, weight, mask);
  Tensor dense_grad = in_format(grad_output, p.channels_last);
  p.grad_output = dense_grad.const_data_ptr();
  p.grad_input = output_mask[0] ? grad_input.mutable_data_ptr() : nullptr;
  p.grad_offset = output_mask[1] ? grad_offset.mutable_data_ptr() : nullptr;
  p.grad_weight = output_mask[2] ? grad_weight.mutable_data_ptr() : nullptr;
  p.grad_bias = output_mask[3] ? grad_bias.mutable_data_ptr() : nullptr;
  p.grad_mask = mask_wanted ? grad_mask.mutable_data_ptr() : nullptr;
  dispatch_floating(dtype, "deform_conv2d", [&]<class T>() { device.template backward<T>(p); });
  return {grad_input, grad_offset, grad_weight, grad_bias, grad_mask};
}

}  // namespace hdrops::deform_conv2d
