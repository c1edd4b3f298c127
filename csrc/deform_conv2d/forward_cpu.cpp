// The forward kernels of every instruction set and dtype (forward_cpu.h).
#include <cstdlib>
#include <cstring>

#include "common/hd.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "common/sampling.h"
#include "common/work_queue.h"
#include "deform_conv2d/params.h"

#define HDROPS_ISA_WITH_BF16
#define HDROPS_ISA_SOURCE "deform_conv2d/forward_cpu.h"
#include "common/foreach_isa.h"

namespace hdrops::deform_conv2d {

bool needs_wide_index(int64_t image_elements) {
  const char* width = std::getenv("HDROPS_INDEX_WIDTH");
  return !fits_int32(image_elements) || (width != nullptr && std::strcmp(width, "64") == 0);
}

template <class T>
void forward_cpu(const Params& params) {
  ThreadLimit limit(threads_worth(params.work(), kWorkPerThread));
  HDROPS_ISA_CALL(forward<T>(params));
}

// Only this dtype has kernels of its own for the bf16 dot product.
template <>
void forward_cpu<bfloat16>(const Params& params) {
  HDROPS_ISA_CALL_WITH_BF16(forward<bfloat16>(params));
}

template void forward_cpu<float>(const Params&);
template void forward_cpu<double>(const Params&);
template void forward_cpu<float16>(const Params&);

}  // namespace hdrops::deform_conv2d
