// Binds the CUDA kernels of deform_conv2d (binding.h): the input's device, its current stream, and a workspace from
// torch's allocator, which may be handed to others as soon as the call has returned: all on one stream.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "deform_conv2d/binding.h"
#include "deform_conv2d/kernels_cuda.h"

namespace hdrops::deform_conv2d {
namespace {

class Cuda {
 public:
  explicit Cuda(const Tensor& input) : device_(input.device()), guard_(device_.index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_.index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  Tensor allocate(const Tensor&, ScalarType dtype, const std::vector<int64_t>& shape, bool channels_last) const {
    return torch::stable::empty(shape, dtype, std::nullopt, device_, std::nullopt,
                                channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  }

  template <class T>
  void forward(const Params& params) const {
    Tensor workspace = bytes(forward_workspace_bytes<T>(params));
    forward_cuda<T>(params, workspace.mutable_data_ptr(), stream_);
  }
  template <class T>
  void backward(const Params& params) const {
    Tensor workspace = bytes(backward_workspace_bytes<T>(params));
    backward_cuda<T>(params, workspace.mutable_data_ptr(), stream_);
  }

 private:
  Tensor bytes(size_t count) const {
    return torch::stable::empty({int64_t(count)}, ScalarType::Byte, std::nullopt, device_, std::nullopt, std::nullopt);
  }

  torch::stable::Device device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace
}  // namespace hdrops::deform_conv2d

STABLE_TORCH_LIBRARY_IMPL(hdrops, CUDA, m) {
  using hdrops::deform_conv2d::Cuda;
  m.impl("deform_conv2d", TORCH_BOX(&hdrops::deform_conv2d::forward<Cuda>));
  m.impl("_deform_conv2d_backward", TORCH_BOX(&hdrops::deform_conv2d::backward<Cuda>));
}
