// Binds the CPU kernels of deform_conv2d (binding.h). They are deterministic and exact to float, so that neither
// `deterministic` nor `allow_tf32` has anything to ask of them.
#include <torch/csrc/stable/library.h>

#include "common/memory.h"
#include "deform_conv2d/binding.h"

namespace hdrops::deform_conv2d {
namespace {

struct Cpu {
  explicit Cpu(const Tensor&) {}

  Tensor allocate(const Tensor& like, ScalarType dtype, const std::vector<int64_t>& shape, bool channels_last) const {
    Tensor tensor = torch::stable::empty(shape, dtype, std::nullopt, like.device(), std::nullopt,
                                         channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
    advise_huge_pages(tensor.mutable_data_ptr(), size_t(tensor.numel()) * tensor.element_size());
    return tensor;
  }

  template <class T>
  void forward(const Params& params) const {
    forward_cpu<T>(params);
  }
  template <class T>
  void backward(const Params& params) const {
    backward_cpu<T>(params);
  }
};

}  // namespace
}  // namespace hdrops::deform_conv2d

STABLE_TORCH_LIBRARY_IMPL(hdrops, CPU, m) {
  using hdrops::deform_conv2d::Cpu;
  m.impl("deform_conv2d", TORCH_BOX(&hdrops::deform_conv2d::forward<Cpu>));
  m.impl("_deform_conv2d_backward", TORCH_BOX(&hdrops::deform_conv2d::backward<Cpu>));
}
