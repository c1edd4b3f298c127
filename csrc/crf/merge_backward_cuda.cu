// Compiles the backward kernels of merge_exposures, those of floating stacks.
#include "crf/merge_backward_cuda.cuh"

namespace hdrops {

#define HDROPS_INSTANTIATE(T, Out, A)                                                                              \
  template size_t merge_backward_workspace_bytes<T, Out, A>(const MergeParams<A>&, const MergeTablesOf<A>&, bool); \
  template void merge_backward_cuda<T, Out, A>(const MergeParams<A>&, const MergeTablesOf<A>&, const Out*,         \
                                               const MergeOutputs<A>&, void*, cudaStream_t);
HDROPS_INSTANTIATE(float, float, float)
HDROPS_INSTANTIATE(double, double, double)
HDROPS_INSTANTIATE(bfloat16, bfloat16, float)
HDROPS_INSTANTIATE(float16, float16, float)

}  // namespace hdrops
