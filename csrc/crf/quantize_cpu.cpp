// quantize_ste on the CPU.
#include "common/half.h"
#include "common/parallel.h"
#include "crf/quantize_params.h"

#define HDROPS_ISA_SOURCE "crf/quantize_kernels_cpu.h"
#include "common/foreach_isa.h"

namespace hdrops {
namespace {

constexpr int64_t kGrain = 16384;

template <class T>
void dispatch_quantize(const QuantizeParams& p, int64_t begin, int64_t end) {
  HDROPS_ISA_CALL(quantize_range<T>(p, begin, end));
}

template <class T>
void dispatch_pass_gradient(const QuantizeParams& p, int64_t begin, int64_t end) {
  HDROPS_ISA_CALL(pass_gradient_range<T>(p, begin, end));
}

}  // namespace

template <class T>
void quantize_ste_cpu(const QuantizeParams& p) {
  parallel_for(p.count, kGrain, [&](int64_t begin, int64_t end) { dispatch_quantize<T>(p, begin, end); });
}

template <class T>
void quantize_ste_backward_cpu(const QuantizeParams& p) {
  parallel_for(p.count, kGrain, [&](int64_t begin, int64_t end) { dispatch_pass_gradient<T>(p, begin, end); });
}

#define HDROPS_INSTANTIATE(T)                               \
  template void quantize_ste_cpu<T>(const QuantizeParams&); \
  template void quantize_ste_backward_cpu<T>(const QuantizeParams&);
HDROPS_INSTANTIATE(float)
HDROPS_INSTANTIATE(double)
HDROPS_INSTANTIATE(bfloat16)
HDROPS_INSTANTIATE(float16)

}  // namespace hdrops
