// Compiles the forward kernels of crf_lookup.
#include "crf/lookup_cuda.cuh"

namespace hdrops {

#define HDROPS_INSTANTIATE(Out)                                                   \
  template void crf_lookup_cuda<Out, Out>(const LookupParams&, cudaStream_t);     \
  template void crf_lookup_cuda<uint8_t, Out>(const LookupParams&, cudaStream_t); \
  template void crf_lookup_cuda<uint16_t, Out>(const LookupParams&, cudaStream_t);
HDROPS_INSTANTIATE(float)
HDROPS_INSTANTIATE(double)
HDROPS_INSTANTIATE(bfloat16)
HDROPS_INSTANTIATE(float16)

}  // namespace hdrops
