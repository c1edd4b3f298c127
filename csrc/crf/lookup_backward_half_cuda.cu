// Compiles the backward kernels of crf_lookup, those of 16-bit floats.
#include "crf/lookup_cuda.cuh"

namespace hdrops {

#define HDROPS_INSTANTIATE(In, Out)                                                          \
  template void crf_lookup_backward_cuda<In, Out>(const LookupParams&, void*, cudaStream_t); \
  template size_t crf_lookup_backward_workspace_bytes<In, Out>(const LookupParams&);
#define HDROPS_INSTANTIATE_OUT(Out) \
  HDROPS_INSTANTIATE(Out, Out)      \
  HDROPS_INSTANTIATE(uint8_t, Out)  \
  HDROPS_INSTANTIATE(uint16_t, Out)
HDROPS_INSTANTIATE_OUT(bfloat16)
HDROPS_INSTANTIATE_OUT(float16)

}  // namespace hdrops
