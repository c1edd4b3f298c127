// The truncation process on CUDA for boxes whose halo is too large for tiles in shared memory: the stages of
// truncate_stages_cuda.cuh, a launch each, over whole planes in a workspace. A thread takes an element at a time.
// Planes are taken a few at a time, so that the workspace stays within kStagedBytes, but for a plane that alone is
// larger.
#pragma once
#include "crf/kernels_cuda.h"
#include "crf/runs_cuda.cuh"
#include "crf/truncate_stages_cuda.cuh"

namespace hdrops {

constexpr int64_t kStagedBytes = int64_t(64) << 20;

template <class T>
struct InMemory {
  const T* data;
  __device__ __forceinline__ device_acc_t<T> operator()(int64_t i) const { return load_as(data[i]); }
};

enum class TruncateStage : int {
  row_moments,
  guide,
  guide_sums,
  base,
  base_gradient,
  base_gradient_sums,
  moment_gradients,
  moment_gradient_sums,
  image_gradient
};

// The stages that go along a row; the others go down a column.
HDROPS_HD constexpr bool is_along_row(TruncateStage stage) {
  return stage == TruncateStage::row_moments || stage == TruncateStage::guide_sums ||
         stage == TruncateStage::base_gradient_sums || stage == TruncateStage::moment_gradient_sums;
}

template <bool kBackward, class T>
using StagesInMemory = TruncateStages<0, kBackward, device_acc_t<T>, InMemory<T>>;

template <bool kBackward, class T>
constexpr int kStagedBuffers = kBackward ? 6 : 4;

template <bool kBackward, class T>
int64_t staged_planes(const TruncateParams& p) {
  const int64_t bytes = p.height * p.row() * kStagedBuffers<kBackward, T> * int64_t(sizeof(device_acc_t<T>));
  const int64_t planes = bytes > 0 ? kStagedBytes / bytes : 1;
  return planes < 1 ? 1 : planes < p.planes ? planes : p.planes;
}

// `planes` planes; `direct`: what of the gradient goes through no box.
template <TruncateStage kStage, bool kBackward, class T>
__global__ __launch_bounds__(kRunThreads, 4) void truncate_stage_kernel(TruncateParams p, int64_t planes,
                                                                        StagesInMemory<kBackward, T> stages,
                                                                        const T* grad_output, device_acc_t<T>* direct,
                                                                        T* output) {
  const int64_t row = p.width * p.step, count = planes * p.height * row;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    const Ends ends =
        is_along_row(kStage) ? Ends::of(i % row / p.step, p.width) : Ends::of(i / row % p.height, p.height);
    const Line<int64_t, true> line{i, is_along_row(kStage) ? p.step : row, ends};
    if constexpr (kStage == TruncateStage::row_moments) stages.row_moments(line);
    if constexpr (kStage == TruncateStage::guide) stages.guide(line);
    if constexpr (kStage == TruncateStage::guide_sums) stages.guide_sums(line);
    if constexpr (kStage == TruncateStage::base) output[i] = store_as<T>(stages.base(line));
    if constexpr (kStage == TruncateStage::base_gradient)
      direct[i] = stages.base_gradient(line, load_as(grad_output[i]));
    if constexpr (kStage == TruncateStage::base_gradient_sums) stages.base_gradient_sums(line);
    if constexpr (kStage == TruncateStage::moment_gradients) stages.moment_gradients(line);
    if constexpr (kStage == TruncateStage::moment_gradient_sums) stages.moment_gradient_sums(line);
    if constexpr (kStage == TruncateStage::image_gradient) {
      output[i] = store_as<T>(direct[i] + stages.image_gradient(line));
    }
  }
}

template <bool kBackward, class T>
size_t staged_bytes(const TruncateParams& p) {
  const int64_t elements = staged_planes<kBackward, T>(p) * p.height * p.row();
  return size_t(elements) * kStagedBuffers<kBackward, T> * sizeof(device_acc_t<T>);
}

template <bool kBackward, class T>
void launch_truncate_stages(const TruncateParams& p, const T* input, const T* grad_output, T* output, void* workspace,
                            cudaStream_t stream) {
  using A = device_acc_t<T>;
  const int64_t plane = p.height * p.row(), most = staged_planes<kBackward, T>(p), size = most * plane;
  A* buffers = static_cast<A*>(workspace);
  StagesInMemory<kBackward, T> stages{};
  stages.first = buffers, stages.second = buffers + size, stages.slope = buffers + 2 * size;
  stages.shift = stages.inverse = buffers + 3 * size;
  stages.given_radius = int(p.radius), stages.eps = filter_eps<A>(p.eps);
  A* direct = nullptr;
  if constexpr (kBackward) stages.offset = buffers + 4 * size, direct = buffers + 5 * size;
  for (int64_t done = 0; done < p.planes; done += most) {
    const int64_t planes = p.planes - done < most ? p.planes - done : most;
    stages.image = {input + done * plane};
    const T* grad = kBackward ? grad_output + done * plane : nullptr;
    const auto run = [&](auto kernel) {
      launch(kernel, grid_over(planes * plane), stream, p, planes, stages, grad, direct, output + done * plane);
    };
    run(truncate_stage_kernel<TruncateStage::row_moments, kBackward, T>);
    run(truncate_stage_kernel<TruncateStage::guide, kBackward, T>);
    run(truncate_stage_kernel<TruncateStage::guide_sums, kBackward, T>);
    if constexpr (kBackward) {
      run(truncate_stage_kernel<TruncateStage::base_gradient, kBackward, T>);
      run(truncate_stage_kernel<TruncateStage::base_gradient_sums, kBackward, T>);
      run(truncate_stage_kernel<TruncateStage::moment_gradients, kBackward, T>);
      run(truncate_stage_kernel<TruncateStage::moment_gradient_sums, kBackward, T>);
      run(truncate_stage_kernel<TruncateStage::image_gradient, kBackward, T>);
    } else {
      run(truncate_stage_kernel<TruncateStage::base, kBackward, T>);
    }
  }
}

}  // namespace hdrops
