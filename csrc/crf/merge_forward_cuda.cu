// Compiles the forward kernels of merge_exposures.
#include "crf/merge_forward_cuda.cuh"

namespace hdrops {

#define HDROPS_INSTANTIATE(T, Out, A)                                                                       \
  template size_t merge_forward_workspace_bytes<T, Out, A>(const MergeParams<A>&, const MergeTablesOf<A>&); \
  template void merge_forward_cuda<T, Out, A>(const MergeParams<A>&, const MergeTablesOf<A>&, Out*, void*,  \
                                              cudaStream_t);
HDROPS_INSTANTIATE(uint8_t, float, float)
HDROPS_INSTANTIATE(uint8_t, double, double)
HDROPS_INSTANTIATE(uint16_t, float, float)
HDROPS_INSTANTIATE(uint16_t, double, double)
HDROPS_INSTANTIATE(float, float, float)
HDROPS_INSTANTIATE(double, double, double)
HDROPS_INSTANTIATE(bfloat16, bfloat16, float)
HDROPS_INSTANTIATE(float16, float16, float)

}  // namespace hdrops
