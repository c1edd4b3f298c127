// Compiles the backward kernels of merge_exposures, those of codes.
#include "crf/merge_backward_cuda.cuh"

namespace hdrops {

#define HDROPS_INSTANTIATE(T, Out, A)                                                                              \
  template size_t merge_backward_workspace_bytes<T, Out, A>(const MergeParams<A>&, const MergeTablesOf<A>&, bool); \
  template void merge_backward_cuda<T, Out, A>(const MergeParams<A>&, const MergeTablesOf<A>&, const Out*,         \
                                               const MergeOutputs<A>&, void*, cudaStream_t);
HDROPS_INSTANTIATE(uint8_t, float, float)
HDROPS_INSTANTIATE(uint8_t, double, double)
HDROPS_INSTANTIATE(uint16_t, float, float)
HDROPS_INSTANTIATE(uint16_t, double, double)

}  // namespace hdrops
