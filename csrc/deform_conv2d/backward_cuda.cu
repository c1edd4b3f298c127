// The backward kernels of every dtype (backward_cuda.cuh).
#include "deform_conv2d/backward_cuda.cuh"

namespace hdrops::deform_conv2d {

template size_t backward_workspace_bytes<float>(const Params&);
template size_t backward_workspace_bytes<double>(const Params&);
template size_t backward_workspace_bytes<bfloat16>(const Params&);
template size_t backward_workspace_bytes<float16>(const Params&);
template void backward_cuda<float>(const Params&, void*, cudaStream_t);
template void backward_cuda<double>(const Params&, void*, cudaStream_t);
template void backward_cuda<bfloat16>(const Params&, void*, cudaStream_t);
template void backward_cuda<float16>(const Params&, void*, cudaStream_t);

}  // namespace hdrops::deform_conv2d
