// The bindings of merge_exposures for any device: checks, memory layout, outputs. bind_merge_cpu.cpp and
// bind_merge_cuda.cu register them, each with its Backend, an object of one call:
//
//   explicit Backend(const Tensor& stack)       makes the stack's device the current one
//   void allocated(const Tensor&) const         is told of a large output before it is written
//   void forward<T>(bracket, params, output)    runs the kernels
//   void backward<T>(bracket, params, grad_output, gradients)
//
// A stack is used where it lies if each frame is dense, planar or interleaved (channels last), whatever the strides of
// images and frames are; else it is copied to planar. The result is channels last if the frames are interleaved.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "crf/merge_params.h"

namespace hdrops {

using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;

constexpr const char* kMerge = "merge_exposures";

inline bool frames_have_strides(const Tensor& stack, int64_t channel, int64_t row, int64_t column) {
  const int64_t wanted[] = {channel, row, column};
  for (int64_t k = 0; k < 3; ++k) {
    if (stack.size(2 + k) != 1 && stack.stride(2 + k) != wanted[k]) return false;
  }
  return true;
}

// The arguments of forward and backward, checked and made readable.
struct Bracket {
  Tensor stack, log_exposures, weight;
  std::optional<Tensor> curve, mask;
  bool interleaved, fallback;

  Bracket(const Tensor& stack_, const Tensor& log_exposures_, const std::optional<Tensor>& curve_,
          const Tensor& weight_, const std::optional<Tensor>& mask_, bool fallback_)
      : stack(stack_),
        log_exposures(torch::stable::contiguous(log_exposures_)),
        weight(torch::stable::contiguous(weight_)),
        fallback(fallback_) {
    HDROPS_CHECK(stack.dim() == 5 && stack.size(1) >= 1, kMerge, ": stack must be [N, P, C, H, W] with P >= 1");
    const int64_t c = stack.size(2), h = stack.size(3), w = stack.size(4);
    const bool planar = frames_have_strides(stack, h * w, w, 1);
    interleaved = !planar && frames_have_strides(stack, 1, w * c, c);
    if (!planar && !interleaved) stack = torch::stable::contiguous(stack);
    if (curve_) curve = torch::stable::contiguous(*curve_);
    if (mask_) mask = torch::stable::contiguous(*mask_);
    check();
  }

  int64_t batch() const { return stack.size(0); }
  int64_t frames() const { return stack.size(1); }
  int64_t channels() const { return stack.size(2); }
  int64_t pixels() const { return stack.size(3) * stack.size(4); }
  bool per_image(const Tensor& tensor) const { return tensor.size(0) > 1; }

  // Of log_exposures, curve and weight: what the merge is computed in.
  ScalarType computed() const { return log_exposures.scalar_type(); }

  ScalarType radiance() const {
    return stack.scalar_type() == ScalarType::Byte || stack.scalar_type() == ScalarType::UInt16 ? computed()
                                                                                                : stack.scalar_type();
  }

  Tensor empty_radiance() const {
    return torch::stable::empty({batch(), channels(), stack.size(3), stack.size(4)}, radiance(), std::nullopt,
                                stack.device(), std::nullopt,
                                interleaved ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  }

  // Dense, laid out as the stack is read.
  Tensor empty_stack() const {
    if (!interleaved) {
      return torch::stable::new_empty(stack, {batch(), frames(), channels(), stack.size(3), stack.size(4)});
    }
    Tensor stored = torch::stable::new_empty(stack, {batch(), frames(), stack.size(3), stack.size(4), channels()});
    return torch::stable::transpose(torch::stable::transpose(stored, 3, 4), 2, 3);
  }

  template <class A>
  MergeParams<A> params() const {
    MergeParams<A> p{};
    p.batch = batch(), p.frames = frames(), p.channels = channels(), p.pixels = pixels();
    p.interleaved = interleaved, p.fallback = fallback;
    p.stack = stack.const_data_ptr();
    p.stack_stride_n = stack.stride(0), p.stack_stride_p = stack.stride(1);
    p.curve_length = curve ? curve->size(2) : 0;
    p.weight = static_cast<const A*>(weight.const_data_ptr());
    p.weight_length = weight.size(0);
    if (mask) {
      p.mask = mask->const_data_ptr();
      p.mask_kind = mask->scalar_type() == ScalarType::Bool ? MergeMask::boolean : MergeMask::real;
      p.mask_stride_n = per_image(*mask) ? frames() * pixels() : 0;
    }
    return p;
  }

  int64_t exposure_images() const { return log_exposures.size(0); }
  int64_t curve_images() const { return curve ? curve->size(0) : 1; }
  int64_t curve_channels() const { return curve ? curve->size(1) : 1; }

  void check_device(const char* name, const Tensor& tensor) const {
    HDROPS_CHECK(tensor.device() == stack.device(), kMerge, ": ", name, " must be on the stack's device");
  }

 private:
  void check() const {
    const int64_t n = batch(), p = frames(), c = channels();
    HDROPS_CHECK(computed() == ScalarType::Float || computed() == ScalarType::Double, kMerge,
                 ": log_exposures must be float32 or float64");
    HDROPS_CHECK(log_exposures.dim() == 2 && (log_exposures.size(0) == 1 || log_exposures.size(0) == n) &&
                     log_exposures.size(1) == p,
                 kMerge, ": log_exposures must be [N or 1, P]");
    check_device("log_exposures", log_exposures);
    check_device("weight", weight);
    if (curve) check_device("curve", *curve);
    if (mask) check_device("mask", *mask);
    HDROPS_CHECK(weight.dim() == 1 && weight.size(0) >= 1 && weight.scalar_type() == computed(), kMerge,
                 ": weight must be [L] in the dtype of log_exposures");
    HDROPS_CHECK(weight.size(0) < INT32_MAX && p < INT32_MAX, kMerge, ": weight and frames must be below 2^31");
    if (curve) {
      HDROPS_CHECK(curve->dim() == 3 && (curve->size(0) == 1 || curve->size(0) == n) &&
                       (curve->size(1) == 1 || curve->size(1) == c) && curve->size(2) >= 1,
                   kMerge, ": curve must be [N or 1, C or 1, L]");
      HDROPS_CHECK(curve->scalar_type() == computed(), kMerge, ": curve must have the dtype of log_exposures");
      HDROPS_CHECK(curve->size(1) * curve->size(2) < INT32_MAX, kMerge, ": curve must have fewer than 2^31 entries");
    }
    if (mask) {
      HDROPS_CHECK(mask->dim() == 5 && (mask->size(0) == 1 || mask->size(0) == n) && mask->size(1) == p &&
                       mask->size(2) == 1 && mask->size(3) == stack.size(3) && mask->size(4) == stack.size(4),
                   kMerge, ": mask must be [N or 1, P, 1, H, W]");
      HDROPS_CHECK(mask->scalar_type() == ScalarType::Bool || mask->scalar_type() == computed(), kMerge,
                   ": mask must be bool or have the dtype of log_exposures");
    }
  }
};

// From the stack's dtype, and the one computed in, to the kernels' types: f.template operator()<T, Out, A>().
template <class F>
auto dispatch_merge(const Bracket& bracket, F&& f) {
  const ScalarType dtype = bracket.stack.scalar_type();
  const bool wide = bracket.computed() == ScalarType::Double;
  HDROPS_CHECK(dtype == ScalarType::Byte || dtype == ScalarType::UInt16 || wide == (dtype == ScalarType::Double),
               kMerge, ": log_exposures must be float64 for a float64 stack, float32 for other floating ones");
  if (dtype == ScalarType::Byte && wide) return f.template operator()<uint8_t, double, double>();
  if (dtype == ScalarType::Byte) return f.template operator()<uint8_t, float, float>();
  if (dtype == ScalarType::UInt16 && wide) return f.template operator()<uint16_t, double, double>();
  if (dtype == ScalarType::UInt16) return f.template operator()<uint16_t, float, float>();
  return dispatch_floating(dtype, kMerge, [&]<class T>() { return f.template operator()<T, T, acc_t<T>>(); });
}

template <class Backend>
Tensor merge_exposures(const Tensor& stack, const Tensor& log_exposures, const std::optional<Tensor>& curve,
                       const Tensor& weight, const std::optional<Tensor>& mask, bool fallback) {
  const Bracket bracket(stack, log_exposures, curve, weight, mask, fallback);
  Backend backend(stack);
  Tensor radiance = bracket.empty_radiance();
  if (radiance.numel() == 0) return radiance;
  dispatch_merge(bracket, [&]<class T, class Out, class A>() {
    backend.template forward<T>(bracket, bracket.params<A>(), static_cast<Out*>(radiance.mutable_data_ptr()));
  });
  return radiance;
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> merge_exposures_backward(const Tensor& grad_output, const Tensor& stack,
                                                            const Tensor& log_exposures,
                                                            const std::optional<Tensor>& curve, const Tensor& weight,
                                                            const std::optional<Tensor>& mask, bool fallback,
                                                            std::vector<bool> wanted) {
  const Bracket bracket(stack, log_exposures, curve, weight, mask, fallback);
  HDROPS_CHECK(wanted.size() == 3, kMerge, ": output_mask must have 3 entries");
  HDROPS_CHECK(grad_output.dim() == 4 && grad_output.size(0) == bracket.batch() &&
                   grad_output.size(1) == bracket.channels() && grad_output.size(2) == bracket.stack.size(3) &&
                   grad_output.size(3) == bracket.stack.size(4) && grad_output.scalar_type() == bracket.radiance(),
               kMerge, ": grad_output must have the shape and dtype of the result");
  bracket.check_device("grad_output", grad_output);
  wanted[0] = wanted[0] && bracket.stack.scalar_type() == bracket.radiance();
  wanted[2] = wanted[2] && bracket.curve.has_value();
  const ScalarType computed = bracket.computed();
  Backend backend(stack);
  const auto fresh = [&](bool wanted_one, const Tensor& like) {
    return wanted_one ? torch::stable::new_empty(stack, like.sizes(), computed)
                      : torch::stable::new_empty(stack, {0}, computed);
  };
  Tensor grad_stack = wanted[0] ? bracket.empty_stack() : torch::stable::new_empty(stack, {0}, bracket.radiance());
  Tensor grad_log_exposures = fresh(wanted[1], bracket.log_exposures);
  Tensor grad_curve = fresh(wanted[2], wanted[2] ? *bracket.curve : stack);
  if (grad_output.numel() == 0) {
    if (wanted[1]) torch::stable::zero_(grad_log_exposures);
    if (wanted[2]) torch::stable::zero_(grad_curve);
    return {grad_stack, grad_log_exposures, grad_curve};
  }
  if (wanted[0]) backend.allocated(grad_stack);
  const Tensor grad = torch::stable::contiguous(
      grad_output, bracket.interleaved ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  dispatch_merge(bracket, [&]<class T, class Out, class A>() {
    const auto pointer = [](bool wanted_one, Tensor& gradient) {
      return wanted_one ? gradient.mutable_data_ptr() : nullptr;
    };
    const MergeOutputs<A> gradients{pointer(wanted[0], grad_stack),
                                    static_cast<A*>(pointer(wanted[1], grad_log_exposures)),
                                    static_cast<A*>(pointer(wanted[2], grad_curve))};
    backend.template backward<T>(bracket, bracket.params<A>(), static_cast<const Out*>(grad.const_data_ptr()),
                                 gradients);
  });
  return {grad_stack, grad_log_exposures, grad_curve};
}

}  // namespace hdrops
