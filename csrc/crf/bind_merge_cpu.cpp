// Binds the CPU kernels of merge_exposures (merge_bindings.h), and sums the parts of the gradients.
#include <algorithm>
#include <cmath>
#include <vector>

#include "common/memory.h"
#include "crf/merge_bindings.h"
#include "crf/merge_cpu.h"
#include "crf/merge_plan.h"

namespace hdrops {
namespace {

// The values that only the host can refuse.
template <class A>
void check_values(const Bracket& bracket) {
  const Tensor &log_exposures = bracket.log_exposures, &weight = bracket.weight;
  const A* times = static_cast<const A*>(log_exposures.const_data_ptr());
  for (int64_t i = 0; i < log_exposures.numel(); ++i) {
    HDROPS_CHECK(std::isfinite(times[i]), kMerge, ": log_exposures must be finite, got ", times[i], " for frame ",
                 i % bracket.frames());
  }
  const A* weights = static_cast<const A*>(weight.const_data_ptr());
  for (int64_t i = 0; i < weight.numel(); ++i) {
    HDROPS_CHECK(std::isfinite(weights[i]) && weights[i] >= 0, kMerge, ": weight must be finite and not negative, got ",
                 weights[i], " in entry ", i);
  }
}

template <class A>
MergePlan<A> make_plan(const Bracket& bracket, MergeParams<A>& p) {
  check_values<A>(bracket);
  return MergePlan<A>(p, static_cast<const A*>(bracket.log_exposures.const_data_ptr()), bracket.exposure_images(),
                      bracket.curve ? static_cast<const A*>(bracket.curve->const_data_ptr()) : nullptr,
                      bracket.curve_images(), bracket.curve_channels(),
                      bracket.stack.scalar_type() == ScalarType::Byte);
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

struct Cpu {
  explicit Cpu(const Tensor&) {}

  void allocated(const Tensor& fresh) const {
    advise_huge_pages(fresh.mutable_data_ptr(), size_t(fresh.numel()) * fresh.element_size());
  }

  template <class T, class Out, class A>
  void forward(const Bracket& bracket, MergeParams<A> p, Out* output) const {
    const MergePlan<A> plan = make_plan(bracket, p);
    merge_forward_cpu<T>(p, output);
  }

  template <class T, class Out, class A>
  void backward(const Bracket& bracket, MergeParams<A> p, const Out* grad_output,
                const MergeOutputs<A>& outputs) const {
    const MergePlan<A> plan = make_plan(bracket, p);
    const bool of_curve = outputs.curve != nullptr;
    // Long enough that the parts of the curve's gradient stay small beside the stack.
    const int64_t least = of_curve ? std::max<int64_t>(65536, 8 * p.curve_length) : 65536;
    const MergeTasks tasks = merge_tasks(p.batch, p.channels, p.pixels, p.interleaved, least);
    const bool in_stream = p.interleaved && p.curve_stride_c != 0;
    const int64_t curve_part = of_curve ? p.curve_length * (in_stream ? p.channels : 1) : 0;
    std::vector<double> time_parts(size_t(tasks.count() * p.frames)), curve_parts(size_t(tasks.count() * curve_part));
    MergeGradients gradients{};
    gradients.stack = outputs.stack;
    gradients.log_exposures = time_parts.data();
    gradients.curve = of_curve ? curve_parts.data() : nullptr;
    merge_backward_cpu<T>(p, tasks, grad_output, gradients);

    const int64_t streams_per_image = p.interleaved ? 1 : p.channels;
    if (outputs.log_exposures != nullptr) {
      const auto sums =
          sum_parts(time_parts, tasks, p.frames, streams_per_image, bracket.per_image(bracket.log_exposures), false);
      for (size_t i = 0; i < sums.size(); ++i) outputs.log_exposures[i] = A(sums[i]);
    }
    if (of_curve) {
      const auto sums = sum_parts(curve_parts, tasks, curve_part, streams_per_image, bracket.per_image(*bracket.curve),
                                  !p.interleaved && p.curve_stride_c != 0);
      const A* given = static_cast<const A*>(bracket.curve->const_data_ptr());
      for (size_t i = 0; i < sums.size(); ++i) outputs.curve[i] = given[i] > 0 ? A(sums[i]) : A(0);  // else replaced
    }
  }
};

}  // namespace
}  // namespace hdrops

STABLE_TORCH_LIBRARY_IMPL(hdrops, CPU, m) {
  m.impl("merge_exposures", TORCH_BOX(&hdrops::merge_exposures<hdrops::Cpu>));
  m.impl("_merge_exposures_backward", TORCH_BOX(&hdrops::merge_exposures_backward<hdrops::Cpu>));
}
