// The bindings of truncate for any device: checks, memory layout, output. A channels-last image is used as it is, any
// other is made contiguous. bind_truncate_cpu.cpp and bind_truncate_cuda.cu register them, each with its Backend, an
// object of one call:
//
//   explicit Backend(const Tensor& input)     makes the input's device the current one
//   void run<T>(const TruncateParams&, const T* input, const T* grad_output, T* output)   grad_output null: forward
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "common/dispatch.h"
#include "common/layout.h"
#include "crf/truncate_params.h"

namespace hdrops {

using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;

// The result, or with grad_output the gradient; both in the input's layout.
template <class Backend>
Tensor run_truncate(const Tensor& input, const Tensor* grad_output, int64_t radius, double eps) {
  HDROPS_CHECK(input.dim() == 4, "truncate: input must be [N, C, H, W]");
  HDROPS_CHECK(radius >= 1 && radius < input.size(2) && radius < input.size(3),
               "truncate: radius must be at least 1 and below height and width, got ", radius);
  HDROPS_CHECK(eps > 0, "truncate: eps must be above 0, got ", eps);
  const bool channels_last = is_channels_last(input);
  const MemoryFormat format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  Backend backend(input);
  Tensor output =
      torch::stable::empty(input.sizes(), input.scalar_type(), std::nullopt, input.device(), std::nullopt, format);
  if (output.numel() == 0) return output;
  const Tensor image = torch::stable::contiguous(input, format);
  const Tensor grad = grad_output == nullptr ? image : torch::stable::contiguous(*grad_output, format);

  TruncateParams p{};
  p.planes = channels_last ? input.size(0) : input.size(0) * input.size(1);
  p.height = input.size(2), p.width = input.size(3), p.step = channels_last ? input.size(1) : 1;
  p.radius = radius, p.eps = eps;
  dispatch_floating(input.scalar_type(), "truncate", [&]<class T>() {
    backend.template run<T>(p, static_cast<const T*>(image.const_data_ptr()),
                            grad_output == nullptr ? nullptr : static_cast<const T*>(grad.const_data_ptr()),
                            static_cast<T*>(output.mutable_data_ptr()));
  });
  return output;
}

template <class Backend>
Tensor truncate_forward(const Tensor& input, int64_t radius, double eps) {
  return run_truncate<Backend>(input, nullptr, radius, eps);
}

template <class Backend>
Tensor truncate_backward(const Tensor& grad_output, const Tensor& input, int64_t radius, double eps) {
  bool same = grad_output.dim() == input.dim() && grad_output.scalar_type() == input.scalar_type();
  for (int64_t dim = 0; same && dim < input.dim(); ++dim) same = grad_output.size(dim) == input.size(dim);
  HDROPS_CHECK(same, "truncate: grad_output must have the shape and dtype of input");
  HDROPS_CHECK(grad_output.device() == input.device(), "truncate: grad_output must be on input's device");
  return run_truncate<Backend>(input, &grad_output, radius, eps);
}

}  // namespace hdrops
