// The forward kernels of every dtype (forward_cuda.cuh).
#include "deform_conv2d/forward_cuda.cuh"

namespace hdrops::deform_conv2d {

template size_t forward_workspace_bytes<float>(const Params&);
template size_t forward_workspace_bytes<double>(const Params&);
template size_t forward_workspace_bytes<bfloat16>(const Params&);
template size_t forward_workspace_bytes<float16>(const Params&);
template void forward_cuda<float>(const Params&, void*, cudaStream_t);
template void forward_cuda<double>(const Params&, void*, cudaStream_t);
template void forward_cuda<bfloat16>(const Params&, void*, cudaStream_t);
template void forward_cuda<float16>(const Params&, void*, cudaStream_t);

}  // namespace hdrops::deform_conv2d
