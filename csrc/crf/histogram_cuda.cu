// Compiles the kernels of tent_histogram and value_histogram.
#include "crf/histogram_cuda.cuh"

namespace hdrops {

#define HDROPS_INSTANTIATE(T)                                                              \
  template size_t tent_workspace_bytes<T>(const TentParams&);                              \
  template void tent_histogram_cuda<T>(const TentParams&, void*, cudaStream_t);            \
  template void tent_histogram_backward_cuda<T>(const TentParams&, void*, cudaStream_t);   \
  template size_t value_histogram_workspace_bytes<T>(const ValueHistogramParams&);         \
  template void value_histogram_cuda<T>(const ValueHistogramParams&, void*, cudaStream_t); \
  template void value_histogram_backward_cuda<T>(const ValueHistogramParams&, cudaStream_t);
HDROPS_INSTANTIATE(float)
HDROPS_INSTANTIATE(double)
HDROPS_INSTANTIATE(bfloat16)
HDROPS_INSTANTIATE(float16)

}  // namespace hdrops
