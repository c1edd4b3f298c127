// Compiles the kernels of truncate.
#include "crf/truncate_cuda.cuh"

namespace hdrops {

#define HDROPS_INSTANTIATE(T)                                               \
  template size_t truncate_workspace_bytes<T>(const TruncateParams&, bool); \
  template void truncate_cuda<T>(const TruncateParams&, const T*, const T*, T*, void*, cudaStream_t);
HDROPS_INSTANTIATE(float)
HDROPS_INSTANTIATE(double)
HDROPS_INSTANTIATE(bfloat16)
HDROPS_INSTANTIATE(float16)

}  // namespace hdrops
