// parallel_for on torch's thread pool (see parallel.h).
#include "common/parallel.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace hdrops {

void parallel_for_erased(int64_t count, int64_t grain, RangeBody body, void* context) {
  if (count <= 0) return;
  torch::stable::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

int64_t threads_worth(int64_t work, int64_t grain) {
  return std::clamp(work / grain, int64_t(1), std::max(thread_count(), int64_t(1)));
}

}  // namespace hdrops
