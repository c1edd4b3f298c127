// The CUDA kernels of deform_conv2d, for their binding; T is float, double, bfloat16 or float16. They are launched on
// `stream` of the current device; `workspace` has as many bytes as the function beside says for the same parameters on
// this device, 128-byte aligned.
#pragma once
#include <cuda_runtime.h>

#include "deform_conv2d/params.h"

namespace hdrops::deform_conv2d {

template <class T>
size_t forward_workspace_bytes(const Params& params);
template <class T>
void forward_cuda(const Params& params, void* workspace, cudaStream_t stream);

template <class T>
size_t backward_workspace_bytes(const Params& params);
template <class T>
void backward_cuda(const Params& params, void* workspace, cudaStream_t stream);

}  // namespace hdrops::deform_conv2d
