// Binds the CPU kernels of crf_lookup, tent_histogram, value_histogram and quantize_ste (bindings.h).
#include "common/memory.h"
#include "crf/bindings.h"

namespace hdrops {
namespace {

struct Cpu {
  explicit Cpu(const Tensor&) {}

  void allocated(const Tensor& fresh) const {
    advise_huge_pages(fresh.mutable_data_ptr(), size_t(fresh.numel()) * fresh.element_size());
  }

  template <class In, class Out>
  void lookup(const LookupParams& p) const {
    crf_lookup_cpu<In, Out>(p);
  }
  template <class In, class Out>
  void lookup_backward(const LookupParams& p) const {
    crf_lookup_backward_cpu<In, Out>(p);
  }
  template <class T>
  void tents(const TentParams& p) const {
    tent_histogram_cpu<T>(p);
  }
  template <class T>
  void tents_backward(const TentParams& p) const {
    tent_histogram_backward_cpu<T>(p);
  }
  template <class T>
  void values(const ValueHistogramParams& p) const {
    value_histogram_cpu<T>(p);
  }
  template <class T>
  void values_backward(const ValueHistogramParams& p) const {
    value_histogram_backward_cpu<T>(p);
  }
  template <class T>
  void quantize(const QuantizeParams& p) const {
    quantize_ste_cpu<T>(p);
  }
  template <class T>
  void quantize_backward(const QuantizeParams& p) const {
    quantize_ste_backward_cpu<T>(p);
  }
};

}  // namespace
}  // namespace hdrops

STABLE_TORCH_LIBRARY_IMPL(hdrops, CPU, m) {
  m.impl("crf_lookup", TORCH_BOX(&hdrops::crf_lookup<hdrops::Cpu>));
  m.impl("_crf_lookup_backward", TORCH_BOX(&hdrops::crf_lookup_backward<hdrops::Cpu>));
  m.impl("tent_histogram", TORCH_BOX(&hdrops::tent_histogram<hdrops::Cpu>));
  m.impl("_tent_histogram_backward", TORCH_BOX(&hdrops::tent_histogram_backward<hdrops::Cpu>));
  m.impl("value_histogram", TORCH_BOX(&hdrops::value_histogram<hdrops::Cpu>));
  m.impl("_value_histogram_backward", TORCH_BOX(&hdrops::value_histogram_backward<hdrops::Cpu>));
  m.impl("quantize_ste", TORCH_BOX(&hdrops::quantize_ste<hdrops::Cpu>));
  m.impl("_quantize_ste_backward", TORCH_BOX(&hdrops::quantize_ste_backward<hdrops::Cpu>));
}
