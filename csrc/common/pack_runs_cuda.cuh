// Copies of feature maps for kernels that read whole 16-byte vectors of channels: channels last, in runs of equal
// length, each padded with zeros to whole vectors.
#pragma once
#include "common/transpose_cuda.cuh"

namespace hdrops {

// A tensor [images, runs * run, pixels], channels last in memory or not, and its copy [image][run][pixel][padded].
struct RunPacking {
  int64_t images, pixels, runs, run, padded;
  bool channels_last;

  int64_t elements() const { return images * runs * pixels * padded; }
};

constexpr int kRunThreads = 256;

// From channels last. A thread writes one element.
template <class T>
__global__ void __launch_bounds__(kRunThreads)
    copy_runs_kernel(RunPacking p, int64_t count, const T* source, T* target) {
  int64_t at = int64_t(blockIdx.x) * kRunThreads + threadIdx.x;
  if (at >= count) return;
  int64_t channel = at % p.padded, pixel = at / p.padded % p.pixels, plane = at / p.padded / p.pixels;
  int64_t image = plane / p.runs, run = plane % p.runs;
  int64_t from = ((image * p.pixels + pixel) * p.runs + run) * p.run + channel;
  target[at] = channel < p.run ? source[from] : T{};
}

template <class T>
void pack_runs(const RunPacking& p, const void* source, T* target, cudaStream_t stream) {
  const T* from = static_cast<const T*>(source);
  if (p.channels_last) {
    Grid grid{dim3(unsigned(ceil_div<int64_t>(p.elements(), kRunThreads))), dim3(kRunThreads)};
    launch(copy_runs_kernel<T>, grid, stream, p, p.elements(), from, target);
  } else {
    transpose(Transposition<T, T>{from, target, p.images * p.runs, p.run, p.pixels, p.padded}, stream);
  }
}

}  // namespace hdrops
