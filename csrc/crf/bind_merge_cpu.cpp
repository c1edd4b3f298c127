// CPU binding of merge_exposures: checks, memory layout, outputs, and the sum of the gradients' parts.
//
// A stack is used where it lies if each frame is dense, planar or interleaved (channels last), whatever the strides of
// images and frames are; else it is copied to planar. The result is channels last if the frames are interleaved.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "common/memory.h"
#include "crf/merge_cpu.h"
#include "crf/merge_plan.h"

namespace hdrops {
namespace {

using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;

constexpr const char* kOp = "merge_exposures";

bool frames_have_strides(const Tensor& stack, int64_t channel, int64_t row, int64_t column) {
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
    HDROPS_CHECK(stack.dim() == 5 && stack.size(1) >= 1, kOp, ": stack must be [N, P, C, H, W] with P >= 1");
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
                                std::nullopt, std::nullopt,
                                interleaved ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  }

  // Dense, laid out as the stack is read.
  Tensor empty_stack() const {
    if (!interleaved) {
      return torch::stable::empty({batch(), frames(), channels(), stack.size(3), stack.size(4)}, stack.scalar_type());
    }
    Tensor stored =
        torch::stable::empty({batch(), frames(), stack.size(3), stack.size(4), channels()}, stack.scalar_type());
    return torch::stable::transpose(torch::stable::transpose(stored, 3, 4), 2, 3);
  }

  template <class A>
  MergeParams<A> params() const {
    check_values<A>();
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

  template <class A>
  MergePlan<A> plan(MergeParams<A>& p) const {
    return MergePlan<A>(p, static_cast<const A*>(log_exposures.const_data_ptr()), log_exposures.size(0),
                        curve ? static_cast<const A*>(curve->const_data_ptr()) : nullptr, curve ? curve->size(0) : 1,
                        curve ? curve->size(1) : 1, stack.scalar_type() == ScalarType::Byte);
  }

 private:
  void check() const {
    const int64_t n = batch(), p = frames(), c = channels();
    HDROPS_CHECK(computed() == ScalarType::Float || computed() == ScalarType::Double, kOp,
                 ": log_exposures must be float32 or float64");
    HDROPS_CHECK(log_exposures.dim() == 2 && (log_exposures.size(0) == 1 || log_exposures.size(0) == n) &&
                     log_exposures.size(1) == p,
                 kOp, ": log_exposures must be [N or 1, P]");
    HDROPS_CHECK(weight.dim() == 1 && weight.size(0) >= 1 && weight.scalar_type() == computed(), kOp,
                 ": weight must be [L] in the dtype of log_exposures");
    HDROPS_CHECK(weight.size(0) < INT32_MAX && p < INT32_MAX, kOp, ": weight and frames must be below 2^31");
    if (curve) {
      HDROPS_CHECK(curve->dim() == 3 && (curve->size(0) == 1 || curve->size(0) == n) &&
                       (curve->size(1) == 1 || curve->size(1) == c) && curve->size(2) >= 1,
                   kOp, ": curve must be [N or 1, C or 1, L]");
      HDROPS_CHECK(curve->scalar_type() == computed(), kOp, ": curve must have the dtype of log_exposures");
      HDROPS_CHECK(curve->size(1) * curve->size(2) < INT32_MAX, kOp, ": curve must have fewer than 2^31 entries");
    }
    if (mask) {
      HDROPS_CHECK(mask->dim() == 5 && (mask->size(0) == 1 || mask->size(0) == n) && mask->size(1) == p &&
                       mask->size(2) == 1 && mask->size(3) == stack.size(3) && mask->size(4) == stack.size(4),
                   kOp, ": mask must be [N or 1, P, 1, H, W]");
      HDROPS_CHECK(mask->scalar_type() == ScalarType::Bool || mask->scalar_type() == computed(), kOp,
                   ": mask must be bool or have the dtype of log_exposures");
    }
  }

  template <class A>
  void check_values() const {
    const A* times = static_cast<const A*>(log_exposures.const_data_ptr());
    for (int64_t i = 0; i < log_exposures.numel(); ++i) {
      HDROPS_CHECK(std::isfinite(times[i]), kOp, ": log_exposures must be finite, got ", times[i], " for frame ",
                   i % frames());
    }
    const A* weights = static_cast<const A*>(weight.const_data_ptr());
    for (int64_t i = 0; i < weight.numel(); ++i) {
      HDROPS_CHECK(std::isfinite(weights[i]) && weights[i] >= 0, kOp, ": weight must be finite and not negative, got ",
                   weights[i], " in entry ", i);
    }
  }
};

// From the stack's dtype, and the one computed in, to the kernels' types: f.template operator()<T, Out, A>().
template <class F>
auto dispatch_merge(const Bracket& bracket, F&& f) {
  const ScalarType dtype = bracket.stack.scalar_type();
  const bool wide = bracket.computed() == ScalarType::Double;
  HDROPS_CHECK(dtype == ScalarType::Byte || dtype == ScalarType::UInt16 || wide == (dtype == ScalarType::Double), kOp,
               ": log_exposures must be float64 for a float64 stack, float32 for other floating ones");
  if (dtype == ScalarType::Byte && wide) return f.template operator()<uint8_t, double, double>();
  if (dtype == ScalarType::Byte) return f.template operator()<uint8_t, float, float>();
  if (dtype == ScalarType::UInt16 && wide) return f.template operator()<uint16_t, double, double>();
  if (dtype == ScalarType::UInt16) return f.template operator()<uint16_t, float, float>();
  return dispatch_floating(dtype, kOp, [&]<class T>() { return f.template operator()<T, T, acc_t<T>>(); });
}

Tensor forward(const Tensor& stack, const Tensor& log_exposures, const std::optional<Tensor>& curve,
               const Tensor& weight, const std::optional<Tensor>& mask, bool fallback) {
  const Bracket bracket(stack, log_exposures, curve, weight, mask, fallback);
  Tensor radiance = bracket.empty_radiance();
  if (radiance.numel() == 0) return radiance;
  dispatch_merge(bracket, [&]<class T, class Out, class A>() {
    MergeParams<A> p = bracket.params<A>();
    const MergePlan<A> plan = bracket.plan(p);
    merge_forward_cpu<T>(p, static_cast<Out*>(radiance.mutable_data_ptr()));
  });
  return radiance;
}

// Sums the tasks' parts, in order of the tasks, into gradient [images, size]; a stream's part is [part_size] and adds
// to the image and the channel it belongs to.
std::vector<double> sum_parts(const std::vector<double>& parts, const MergeTasks& tasks, int64_t part_size,
                              int64_t streams_per_image, bool per_image, bool per_stream) {
  const int64_t channels = per_stream ? streams_per_image : 1;
  const int64_t images = per_image ? tasks.streams / streams_per_image : 1;
  std::vector<double> sums(size_t(images * channels * part_size), 0.0);
  for (int64_t task = 0; task < tasks.count(); ++task) {
    const int64_t stream = task / tasks.tasks_per_stream;
    const int64_t image = per_image ? stream / streams_per_image : 0;
    const int64_t channel = per_stream ? stream % streams_per_image : 0;
    double* into = sums.data() + (image * channels + channel) * part_size;
    const double* part = parts.data() + task * part_size;
    for (int64_t i = 0; i < part_size; ++i) into[i] += part[i];
  }
  return sums;
}

template <class A>
void copy_to(const std::vector<double>& sums, Tensor& gradient) {
  A* target = static_cast<A*>(gradient.mutable_data_ptr());
  for (size_t i = 0; i < sums.size(); ++i) target[i] = A(sums[i]);
}

template <class T, class Out, class A>
void run_backward(const Bracket& bracket, const Tensor& grad_output, Tensor& grad_stack, Tensor& grad_log_exposures,
                  Tensor& grad_curve, const std::vector<bool>& wanted) {
  MergeParams<A> p = bracket.params<A>();
  const MergePlan<A> plan = bracket.plan(p);
  // Long enough that the parts of the curve's gradient stay small beside the stack.
  const int64_t least = wanted[2] ? std::max<int64_t>(65536, 8 * p.curve_length) : 65536;
  const MergeTasks tasks = merge_tasks(p.batch, p.channels, p.pixels, p.interleaved, least);
  const bool in_stream = p.interleaved && p.curve_stride_c != 0;
  const int64_t curve_part = wanted[2] ? p.curve_length * (in_stream ? p.channels : 1) : 0;
  std::vector<double> time_parts(size_t(tasks.count() * p.frames)), curve_parts(size_t(tasks.count() * curve_part));
  MergeGradients gradients{};
  gradients.stack = wanted[0] ? grad_stack.mutable_data_ptr() : nullptr;
  gradients.log_exposures = time_parts.data();
  gradients.curve = wanted[2] ? curve_parts.data() : nullptr;
  merge_backward_cpu<T>(p, tasks, static_cast<const Out*>(grad_output.const_data_ptr()), gradients);

  const int64_t streams_per_image = p.interleaved ? 1 : p.channels;
  if (wanted[1]) {
    copy_to<A>(
        sum_parts(time_parts, tasks, p.frames, streams_per_image, bracket.per_image(bracket.log_exposures), false),
        grad_log_exposures);
  }
  if (wanted[2]) {
    auto sums = sum_parts(curve_parts, tasks, curve_part, streams_per_image, bracket.per_image(*bracket.curve),
                          !p.interleaved && p.curve_stride_c != 0);
    const A* given = static_cast<const A*>(bracket.curve->const_data_ptr());
    for (size_t i = 0; i < sums.size(); ++i) {
      if (!(given[i] > 0)) sums[i] = 0;  // replaced by a constant
    }
    copy_to<A>(sums, grad_curve);
  }
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& stack, const Tensor& log_exposures,
                                            const std::optional<Tensor>& curve, const Tensor& weight,
                                            const std::optional<Tensor>& mask, bool fallback,
                                            std::vector<bool> wanted) {
  const Bracket bracket(stack, log_exposures, curve, weight, mask, fallback);
  HDROPS_CHECK(wanted.size() == 3, kOp, ": output_mask must have 3 entries");
  HDROPS_CHECK(grad_output.dim() == 4 && grad_output.size(0) == bracket.batch() &&
                   grad_output.size(1) == bracket.channels() && grad_output.size(2) == bracket.stack.size(3) &&
                   grad_output.size(3) == bracket.stack.size(4) && grad_output.scalar_type() == bracket.radiance(),
               kOp, ": grad_output must have the shape and dtype of the result");
  wanted[0] = wanted[0] && bracket.stack.scalar_type() == bracket.radiance();
  wanted[2] = wanted[2] && bracket.curve.has_value();
  const ScalarType computed = bracket.computed();
  Tensor grad_stack = wanted[0] ? bracket.empty_stack() : torch::stable::empty({0}, bracket.radiance());
  Tensor grad_log_exposures =
      wanted[1] ? torch::stable::empty(bracket.log_exposures.sizes(), computed) : torch::stable::empty({0}, computed);
  Tensor grad_curve =
      wanted[2] ? torch::stable::empty(bracket.curve->sizes(), computed) : torch::stable::empty({0}, computed);
  if (grad_output.numel() == 0) {
    if (wanted[1]) torch::stable::zero_(grad_log_exposures);
    if (wanted[2]) torch::stable::zero_(grad_curve);
    return {grad_stack, grad_log_exposures, grad_curve};
  }
  if (wanted[0]) {
    advise_huge_pages(grad_stack.mutable_data_ptr(), size_t(grad_stack.numel()) * grad_stack.element_size());
  }
  const Tensor grad = torch::stable::contiguous(
      grad_output, bracket.interleaved ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  dispatch_merge(bracket, [&]<class T, class Out, class A>() {
    run_backward<T, Out, A>(bracket, grad, grad_stack, grad_log_exposures, grad_curve, wanted);
  });
  return {grad_stack, grad_log_exposures, grad_curve};
}

}  // namespace
}  // namespace hdrops

STABLE_TORCH_LIBRARY_IMPL(hdrops, CPU, m) {
  m.impl("merge_exposures", TORCH_BOX(&hdrops::forward));
  m.impl("_merge_exposures_backward", TORCH_BOX(&hdrops::backward));
}
