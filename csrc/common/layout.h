// How a tensor lies in memory, for the bindings.
#pragma once
#include <torch/csrc/stable/tensor.h>

namespace hdrops {

// Whether an [N, C, H, W] tensor is channels last in memory and nothing else: one that is contiguous too is not.
inline bool is_channels_last(const torch::stable::Tensor& tensor) {
  if (tensor.is_contiguous()) return false;
  int64_t expected = 1;
  for (int64_t dim : {1, 3, 2, 0}) {
    if (tensor.size(dim) != 1 && tensor.stride(dim) != expected) return false;
    expected *= tensor.size(dim);
  }
  return true;
}

}  // namespace hdrops
