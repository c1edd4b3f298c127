// The swap's kernels of every instruction set and dtype (swap_cpu.h).
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "common/hd.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "common/work_queue.h"
#include "patch_match/params.h"
#include "patch_match/places.h"

#define HDROPS_ISA_SOURCE "patch_match/swap_cpu.h"
#include "common/foreach_isa.h"

namespace hdrops::patch_match {

template <class T>
void swap_cpu(const SwapParams& params) {
  ThreadLimit limit(threads_worth(params.work(), kWorkPerThread));
  HDROPS_ISA_CALL(swap_forward<T>(params));
}

template <class T>
void swap_backward_cpu(const SwapParams& params) {
  ThreadLimit limit(threads_worth(params.work(), kWorkPerThread));
  HDROPS_ISA_CALL(swap_backward<T>(params));
}

#define HDROPS_INSTANTIATE(T)                   \
  template void swap_cpu<T>(const SwapParams&); \
  template void swap_backward_cpu<T>(const SwapParams&);
HDROPS_INSTANTIATE(float)
HDROPS_INSTANTIATE(double)
HDROPS_INSTANTIATE(bfloat16)
HDROPS_INSTANTIATE(float16)
#undef HDROPS_INSTANTIATE

}  // namespace hdrops::patch_match
