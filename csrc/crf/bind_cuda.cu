// Binds the CUDA kernels of crf_lookup, tent_histogram, value_histogram and quantize_ste (bindings.h).
#include "common/cuda_call.h"
#include "crf/bindings.h"
#include "crf/kernels_cuda.h"

namespace hdrops {
namespace {

struct Cuda : CudaCall {
  using CudaCall::CudaCall;

  void allocated(const Tensor&) const {}

  template <class In, class Out>
  void lookup(const LookupParams& p) {
    crf_lookup_cuda<In, Out>(p, stream());
  }
  template <class In, class Out>
  void lookup_backward(const LookupParams& p) {
    crf_lookup_backward_cuda<In, Out>(p, workspace(crf_lookup_backward_workspace_bytes<In, Out>(p)), stream());
  }
  template <class T>
  void tents(const TentParams& p) {
    tent_histogram_cuda<T>(p, workspace(tent_workspace_bytes<T>(p)), stream());
  }
  template <class T>
  void tents_backward(const TentParams& p) {
    tent_histogram_backward_cuda<T>(p, workspace(tent_workspace_bytes<T>(p)), stream());
  }
  template <class T>
  void values(const ValueHistogramParams& p) {
    value_histogram_cuda<T>(p, workspace(value_histogram_workspace_bytes<T>(p)), stream());
  }
  template <class T>
  void values_backward(const ValueHistogramParams& p) {
    value_histogram_backward_cuda<T>(p, stream());
  }
  template <class T>
  void quantize(const QuantizeParams& p) {
    quantize_ste_cuda<T>(p, stream());
  }
  template <class T>
  void quantize_backward(const QuantizeParams& p) {
    quantize_ste_backward_cuda<T>(p, stream());
  }
};

}  // namespace
}  // namespace hdrops

STABLE_TORCH_LIBRARY_IMPL(hdrops, CUDA, m) {
  m.impl("crf_lookup", TORCH_BOX(&hdrops::crf_lookup<hdrops::Cuda>));
  m.impl("_crf_lookup_backward", TORCH_BOX(&hdrops::crf_lookup_backward<hdrops::Cuda>));
  m.impl("tent_histogram", TORCH_BOX(&hdrops::tent_histogram<hdrops::Cuda>));
  m.impl("_tent_histogram_backward", TORCH_BOX(&hdrops::tent_histogram_backward<hdrops::Cuda>));
  m.impl("value_histogram", TORCH_BOX(&hdrops::value_histogram<hdrops::Cuda>));
  m.impl("_value_histogram_backward", TORCH_BOX(&hdrops::value_histogram_backward<hdrops::Cuda>));
  m.impl("quantize_ste", TORCH_BOX(&hdrops::quantize_ste<hdrops::Cuda>));
  m.impl("_quantize_ste_backward", TORCH_BOX(&hdrops::quantize_ste_backward<hdrops::Cuda>));
}
