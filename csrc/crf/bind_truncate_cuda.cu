// Binds the CUDA kernels of truncate (truncate_bindings.h).
#include "common/cuda_call.h"
#include "crf/kernels_cuda.h"
#include "crf/truncate_bindings.h"

namespace hdrops {
namespace {

struct Cuda : CudaCall {
  using CudaCall::CudaCall;

  template <class T>
  void run(const TruncateParams& p, const T* input, const T* grad_output, T* output) {
    void* memory = workspace(truncate_workspace_bytes<T>(p, grad_output != nullptr));
    truncate_cuda<T>(p, input, grad_output, output, memory, stream());
  }
};

}  // namespace
}  // namespace hdrops

STABLE_TORCH_LIBRARY_IMPL(hdrops, CUDA, m) {
  m.impl("truncate", TORCH_BOX(&hdrops::truncate_forward<hdrops::Cuda>));
  m.impl("_truncate_backward", TORCH_BOX(&hdrops::truncate_backward<hdrops::Cuda>));
}
