// The backward kernels of every dtype (match_backward_cuda.cuh).
#include "patch_match/match_backward_cuda.cuh"

namespace hdrops::patch_match {

template size_t match_backward_workspace_bytes<float>(const MatchParams&);
template size_t match_backward_workspace_bytes<double>(const MatchParams&);
template size_t match_backward_workspace_bytes<bfloat16>(const MatchParams&);
template size_t match_backward_workspace_bytes<float16>(const MatchParams&);
template void match_backward_cuda<float>(const MatchParams&, void*, cudaStream_t);
template void match_backward_cuda<double>(const MatchParams&, void*, cudaStream_t);
template void match_backward_cuda<bfloat16>(const MatchParams&, void*, cudaStream_t);
template void match_backward_cuda<float16>(const MatchParams&, void*, cudaStream_t);

}  // namespace hdrops::patch_match
