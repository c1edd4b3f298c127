// The backward kernels of every instruction set and dtype (backward_cpu.h).
#include "common/hd.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "common/sampling.h"
#include "common/work_queue.h"
#include "deform_conv2d/params.h"

#define HDROPS_ISA_SOURCE "deform_conv2d/backward_cpu.h"
#include "common/foreach_isa.h"

namespace hdrops::deform_conv2d {

template <class T>
void backward_cpu(const Params& params) {
  ThreadLimit limit(threads_worth(4 * params.work(), kWorkPerThread));
  HDROPS_ISA_CALL(backward<T>(params));
}

template void backward_cpu<float>(const Params&);
template void backward_cpu<double>(const Params&);
template void backward_cpu<bfloat16>(const Params&);
template void backward_cpu<float16>(const Params&);

}  // namespace hdrops::deform_conv2d
