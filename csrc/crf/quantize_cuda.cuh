// quantize_ste on CUDA (OP-13), forward and backward: element by element in memory order, 16 bytes an access.
#pragma once
#include "common/lut.h"
#include "crf/kernels_cuda.h"
#include "crf/runs_cuda.cuh"

namespace hdrops {

constexpr int kQuantizeBlocks = 3;  // of a multiprocessor

template <class T>
struct Quantize {
  using A = device_acc_t<T>;
  template <int V>
  using Item = Vector<T, V>;

  const QuantizeParams& p;
  const T* input = nullptr;
  T* output = nullptr;
  bool aligned = false, aligned_output = false;

  __device__ __forceinline__ int start(const Run& run) {
    input = static_cast<const T*>(p.input) + run.offset;
    output = static_cast<T*>(p.output) + run.offset;
    const int head = until_line<T>(run);
    aligned = is_aligned<T, kRunVector<T>>(input + head);
    aligned_output = is_aligned<T, kRunVector<T>>(output + head);
    return head;
  }

  template <int V>
  __device__ __forceinline__ Item<V> load(int i) const {
    return load_elements<V>(input + i, aligned);
  }

  template <int V>
  __device__ __forceinline__ void finish(int i, const Item<V>& pixels, bool valid) const {
    if (!valid) return;
    const A last = A(p.levels - 1);
    Vector<T, V> result;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const A x = load_as(pixels.value[k]), level = A(int32_t(clamp_to_unit(x) * last + A(0.5)));
      result.value[k] = store_as<T>(x == x ? level / last : x);
    }
    store_elements<V>(output + i, result, aligned_output);
  }

  __device__ __forceinline__ void pause() const {}
};

// The gradient where it passes, else 0.
template <class T>
struct PassGradient {
  using A = device_acc_t<T>;
  template <int V>
  struct Item {
    Vector<T, V> pixels, grad;
  };

  const QuantizeParams& p;
  const T* input = nullptr;
  const T* grad_output = nullptr;
  T* grad_input = nullptr;
  bool aligned_input = false, aligned_grad = false, aligned_result = false;

  __device__ __forceinline__ int start(const Run& run) {
    input = static_cast<const T*>(p.input) + run.offset;
    grad_output = static_cast<const T*>(p.grad_output) + run.offset;
    grad_input = static_cast<T*>(p.grad_input) + run.offset;
    const int head = until_line<T>(run);
    aligned_input = is_aligned<T, kRunVector<T>>(input + head);
    aligned_grad = is_aligned<T, kRunVector<T>>(grad_output + head);
    aligned_result = is_aligned<T, kRunVector<T>>(grad_input + head);
    return head;
  }

  template <int V>
  __device__ __forceinline__ Item<V> load(int i) const {
    return {load_elements<V>(input + i, aligned_input), load_elements<V>(grad_output + i, aligned_grad)};
  }

  template <int V>
  __device__ __forceinline__ void finish(int i, const Item<V>& item, bool valid) const {
    if (!valid) return;
    Vector<T, V> result;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const A x = load_as(item.pixels.value[k]);
      const bool passes = p.gradient_outside ? x - x == A(0) : x >= A(0) && x <= A(1);
      result.value[k] = passes ? item.grad.value[k] : store_as<T>(A(0));
    }
    store_elements<V>(grad_input + i, result, aligned_result);
  }

  __device__ __forceinline__ void pause() const {}
};

template <class Op, class T>
__global__ __launch_bounds__(kRunThreads, kQuantizeBlocks) void quantize_kernel(QuantizeParams p, Parts parts) {
  Op op{p};
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
