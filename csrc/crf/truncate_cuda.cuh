// truncate on CUDA (OP-14), forward and backward: in tiles where their halo fits shared memory
// (truncate_tile_cuda.cuh), else stage by stage (truncate_staged_cuda.cuh). No atomics: every element is written by one
// thread, from sums whose order depends on the shape and the device alone.
#pragma once
#include "crf/truncate_staged_cuda.cuh"
#include "crf/truncate_tile_cuda.cuh"

namespace hdrops {

template <bool kBackward, class T>
size_t workspace_bytes_of_pass(const TruncateParams& p) {
  return truncate_tiling<kBackward, T>(p).width > 0 ? 0 : staged_bytes<kBackward, T>(p);
}

template <class T>
size_t truncate_workspace_bytes(const TruncateParams& p, bool backward) {
  return backward ? workspace_bytes_of_pass<true, T>(p) : workspace_bytes_of_pass<false, T>(p);
}

template <bool kBackward, class T>
void launch_truncate(const TruncateParams& p, const T* input, const T* grad_output, T* output, void* workspace,
                     cudaStream_t stream) {
  const TruncateTiling tiling = truncate_tiling<kBackward, T>(p);
  if (tiling.width > 0) return launch_truncate_tiles<kBackward, T>(p, tiling, input, grad_output, output, stream);
  launch_truncate_stages<kBackward, T>(p, input, grad_output, output, workspace, stream);
}

template <class T>
void truncate_cuda(const TruncateParams& p, const T* input, const T* grad_output, T* output, void* workspace,
                   cudaStream_t stream) {
  if (grad_output != nullptr) return launch_truncate<true, T>(p, input, grad_output, output, workspace, stream);
  launch_truncate<false, T>(p, input, grad_output, output, workspace, stream);
}

}  // namespace hdrops
