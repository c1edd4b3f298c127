// Compiles the kernels of quantize_ste.
#include "crf/quantize_cuda.cuh"

namespace hdrops {

#define HDROPS_INSTANTIATE(T)                                              \
  template void quantize_ste_cuda<T>(const QuantizeParams&, cudaStream_t); \
  template void quantize_ste_backward_cuda<T>(const QuantizeParams&, cudaStream_t);
HDROPS_INSTANTIATE(float)
HDROPS_INSTANTIATE(double)
HDROPS_INSTANTIATE(bfloat16)
HDROPS_INSTANTIATE(float16)

}  // namespace hdrops
