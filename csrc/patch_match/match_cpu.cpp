// The forward kernels of every instruction set and dtype (match_cpu.h).
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "common/hd.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "common/work_queue.h"
#include "patch_match/params.h"
#include "patch_match/tiles.h"

#define HDROPS_ISA_SOURCE "patch_match/match_cpu.h"
#include "common/foreach_isa.h"

namespace hdrops::patch_match {

template <class T>
void match_cpu(const MatchParams& params) {
  ThreadLimit limit(threads_worth(params.work(), kWorkPerThread));
  HDROPS_ISA_CALL(match<T>(params));
}

template void match_cpu<float>(const MatchParams&);
template void match_cpu<double>(const MatchParams&);
template void match_cpu<bfloat16>(const MatchParams&);
template void match_cpu<float16>(const MatchParams&);

}  // namespace hdrops::patch_match
