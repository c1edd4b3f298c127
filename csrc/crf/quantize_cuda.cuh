// quantize_ste on CUDA (OP-13), forward and backward: element by element in memory order, 16 bytes an access.
#pragma once
#include "common/lut.h"
#include "crf/kernels_cuda.h"
#include "crf/runs_cuda.cuh"

namespace hdrops {

constexpr int kQuantizeBlocks = 3;  // of a multiprocessor

template <class T>
struct Quantize : RunTensors<T, T, false, true> {
  using Tensors = RunTensors<T, T, false, true>;
  using A = device_acc_t<T>;

  const QuantizeParams& p;

  __device__ __forceinline__ explicit Quantize(const QuantizeParams& params)
      : Tensors(params.input, nullptr, params.output), p(params) {}

  template <int V>
  __device__ __forceinline__ void finish(int i, const typename Tensors::template Item<V>& item, bool valid) const {
    if (!valid) return;
    const A last = A(p.levels - 1);
    Vector<T, V> result;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const A x = load_as(item.pixels.value[k]), level = A(int32_t(clamp_to_unit(x) * last + A(0.5)));
      result.value[k] = store_as<T>(x == x ? level / last : x);
    }
    this->store(i, result);
  }
};

// The gradient where it passes, else 0.
template <class T>
struct PassGradient : RunTensors<T, T, true, true> {
  using Tensors = RunTensors<T, T, true, true>;
  using A = device_acc_t<T>;

  const QuantizeParams& p;

  __device__ __forceinline__ explicit PassGradient(const QuantizeParams& params)
      : Tensors(params.input, params.grad_output, params.grad_input), p(params) {}

  template <int V>
  __device__ __forceinline__ void finish(int i, const typename Tensors::template Item<V>& item, bool valid) const {
    if (!valid) return;
    Vector<T, V> result;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const A x = load_as(item.pixels.value[k]);
      const bool passes = p.gradient_outside ? x - x == A(0) : x >= A(0) && x <= A(1);
      result.value[k] = passes ? item.grad.value[k] : store_as<T>(A(0));
    }
    this->store(i, result);
  }
};

template <class Op, class T>
__global__ __launch_bounds__(kRunThreads, kQuantizeBlocks) void quantize_kernel(QuantizeParams p, Parts parts) {
  Op op(p);
  walk_part<kRunVector<T>, kRunInFlight<T>>(op, CurveLayout{1, 1, 1, p.count, 0}, parts, 0, blockIdx.x);
}

template <class Op, class T>
void launch_quantize(const QuantizeParams& p, cudaStream_t stream) {
  const CurveLayout all{1, 1, 1, p.count, 0};
  const Parts parts = parts_for(all, int64_t(kQuantizeBlocks) * device_multiprocessors(), 4096);
  launch(quantize_kernel<Op, T>, {dim3(unsigned(parts.per_group)), dim3(kRunThreads)}, stream, p, parts);
}

template <class T>
void quantize_ste_cuda(const QuantizeParams& p, cudaStream_t stream) {
  launch_quantize<Quantize<T>, T>(p, stream);
}

template <class T>
void quantize_ste_backward_cuda(const QuantizeParams& p, cudaStream_t stream) {
  launch_quantize<PassGradient<T>, T>(p, stream);
}

}  // namespace hdrops
