// Forward pass of exposure merging on CUDA. One pass over the stack: a thread merges the elements of 16 bytes of the
// output (or of the stack, where that is wider), a block a part of one stream. Shared memory: the tables of the
// stream's channels, up to 48 KB.
#pragma once
#include "crf/merge_cuda.cuh"

namespace hdrops {

constexpr int kMergeBlocks = 2;  // of a multiprocessor

// ln E to radiance as it is stored.
template <class Out, class A>
__device__ __forceinline__ Out stored_radiance(A log_radiance) {
  A radiance = radiance_of(log_radiance);
  if constexpr (std::is_same_v<Out, float16>) {  // whose range alone exp's results exceed
    radiance = radiance < A(0x1p-24) ? A(0x1p-24) : radiance > A(65504) ? A(65504) : radiance;
  }
  return store_as<Out>(radiance);
}

template <class T, class Out, class A>
__global__ __launch_bounds__(kRunThreads,
                             kMergeBlocks) void merge_forward_kernel(const __grid_constant__ MergeLaunch<A> merge,
                                                                     Out* output) {
  constexpr int V = kMergeVector<T, Out>;
  const int64_t index = blockIdx.x / merge.parts, part = blockIdx.x % merge.parts;
  const MergeStream<T, A> s(merge, index);
  const MergeTables<T, A> tables(merge, s.image, s.plane, shared_memory<char>());
  const int64_t begin = part * merge.part_length;
  const int64_t end = begin + merge.part_length < merge.stream_length ? begin + merge.part_length : merge.stream_length;
  for (int64_t i = begin + int64_t(threadIdx.x) * V; i < end; i += int64_t(kRunThreads) * V) {
    MergeVector<T, A, V> vector{merge_place(merge.p, i), int(end - i < V ? end - i : V), {}};
    vector.accumulate(tables, s);
    Vector<Out, V> result;
#pragma unroll
    for (int k = 0; k < V; ++k) result.value[k] = stored_radiance<Out>(log_radiance_of(vector.sums[k]));
    Out* target = output + index * merge.stream_length + i;
    store_some(target, result, vector.count);
    for (unsigned slow = vector.slow(s); slow != 0; slow &= slow - 1) {
      const int k = __ffs(int(slow)) - 1;
      const auto one = slow_result(SlowElement<T, A>{tables, s, vector.place(merge.p, k)});
      target[k] = stored_radiance<Out>(one.log_radiance);
    }
  }
}

template <class T, class Out, class A>
size_t merge_forward_workspace_bytes(const MergeParams<A>& p, const MergeTablesOf<A>& of) {
  return merge_workspace_sizes<T>(p, of).total();
}

template <class T, class Out, class A>
void merge_forward_cuda(const MergeParams<A>& p, const MergeTablesOf<A>& of, Out* output, void* workspace,
                        cudaStream_t stream) {
  constexpr int64_t kStep = int64_t(kRunThreads) * kMergeVector<T, Out>;
  MergeLaunch<A> merge = prepare_merge<T>(p, of, workspace, stream);
  cut_streams(merge, int64_t(kMergeBlocks) * device_multiprocessors(), kStep, kStep);
  const Grid grid{dim3(unsigned(merge.streams * merge.parts)), dim3(kRunThreads), size_t(kMergeTableBytes)};
  launch(merge_forward_kernel<T, Out, A>, grid, stream, merge, output);
}

}  // namespace hdrops
