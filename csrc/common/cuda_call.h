// One call of an operator on CUDA, for the bindings: the tensor's device made current, its stream, temporary memory.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "common/launch.h"

namespace hdrops {

class CudaCall {
 public:
  explicit CudaCall(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()), device_(tensor.device()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  // Memory for the kernels of this call. It returns to torch's cache with the call, and the stream keeps the order.
  void* workspace(size_t bytes) {
    if (bytes == 0) return nullptr;
    memory_.push_back(
        torch::stable::empty({int64_t(bytes)}, torch::headeronly::ScalarType::Byte, std::nullopt, device_));
    return memory_.back().mutable_data_ptr();
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  torch::stable::Device device_;
  cudaStream_t stream_ = nullptr;
  std::vector<torch::stable::Tensor> memory_;
};

}  // namespace hdrops
