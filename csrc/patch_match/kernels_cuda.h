// The CUDA kernels of patch matching, for their binding; T is float, double, bfloat16 or float16. They are launched on
// `stream` of the current device; `workspace` has as many bytes as the function beside says for the same parameters on
// this device, 128-byte aligned.
#pragma once
#include <cuda_runtime.h>

#include "patch_match/params.h"

namespace hdrops::patch_match {

template <class T>
size_t match_workspace_bytes(const MatchParams& params);
template <class T>
void match_cuda(const MatchParams& params, void* workspace, cudaStream_t stream);

template <class T>
size_t match_backward_workspace_bytes(const MatchParams& params);
template <class T>
void match_backward_cuda(const MatchParams& params, void* workspace, cudaStream_t stream);

}  // namespace hdrops::patch_match
