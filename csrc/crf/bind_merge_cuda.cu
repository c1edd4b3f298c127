// Binds the CUDA kernels of merge_exposures (merge_bindings.h).
#include "common/cuda_call.h"
#include "crf/kernels_cuda.h"
#include "crf/merge_bindings.h"

namespace hdrops {
namespace {

template <class A>
const A* data(const Tensor& tensor) {
  return static_cast<const A*>(tensor.const_data_ptr());
}

struct Cuda : CudaCall {
  using CudaCall::CudaCall;

  void allocated(const Tensor&) const {}

  template <class A>
  MergeTablesOf<A> tables(const Bracket& bracket) const {
    return {data<A>(bracket.log_exposures), bracket.exposure_images(), bracket.curve_images(),
            bracket.curve_channels()};
  }

  template <class T, class Out, class A>
  void forward(const Bracket& bracket, MergeParams<A> p, Out* output) {
    const MergeTablesOf<A> of = tables<A>(bracket);
    p.curve = bracket.curve ? data<A>(*bracket.curve) : nullptr;
    void* memory = workspace(merge_forward_workspace_bytes<T, Out, A>(p, of));
    merge_forward_cuda<T, Out, A>(p, of, output, memory, stream());
  }

  template <class T, class Out, class A>
  void backward(const Bracket& bracket, MergeParams<A> p, const Out* grad_output, const MergeOutputs<A>& gradients) {
    const MergeTablesOf<A> of = tables<A>(bracket);
    p.curve = bracket.curve ? data<A>(*bracket.curve) : nullptr;
    void* memory = workspace(merge_backward_workspace_bytes<T, Out, A>(p, of, gradients.curve != nullptr));
    merge_backward_cuda<T, Out, A>(p, of, grad_output, gradients, memory, stream());
  }
};

}  // namespace
}  // namespace hdrops

STABLE_TORCH_LIBRARY_IMPL(hdrops, CUDA, m) {
  m.impl("merge_exposures", TORCH_BOX(&hdrops::merge_exposures<hdrops::Cuda>));
  m.impl("_merge_exposures_backward", TORCH_BOX(&hdrops::merge_exposures_backward<hdrops::Cuda>));
}
