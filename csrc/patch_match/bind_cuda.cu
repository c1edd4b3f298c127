// Binds the CUDA kernels of patch_match (bindings.h).
#include <torch/csrc/stable/library.h>

#include "common/cuda_call.h"
#include "patch_match/bindings.h"
#include "patch_match/kernels_cuda.h"

namespace hdrops::patch_match {
namespace {

class Cuda : public CudaCall {
 public:
  explicit Cuda(const Tensor& query) : CudaCall(query), device_(query.device()) {}

  Tensor allocate(ScalarType dtype, const std::vector<int64_t>& shape, bool channels_last) const {
    return torch::stable::empty(shape, dtype, std::nullopt, device_, std::nullopt, format_of(channels_last));
  }

  template <class T>
  void match(const MatchParams& params) {
    match_cuda<T>(params, workspace(match_workspace_bytes<T>(params)), stream());
  }
  template <class T>
  void match_backward(const MatchParams& params) {
    match_backward_cuda<T>(params, workspace(match_backward_workspace_bytes<T>(params)), stream());
  }

 private:
  torch::stable::Device device_;
};

}  // namespace
}  // namespace hdrops::patch_match

STABLE_TORCH_LIBRARY_IMPL(hdrops, CUDA, m) {
  using hdrops::patch_match::Cuda;
  m.impl("patch_match", TORCH_BOX(&hdrops::patch_match::match<Cuda>));
  m.impl("_patch_match_backward", TORCH_BOX(&hdrops::patch_match::match_backward<Cuda>));
}
