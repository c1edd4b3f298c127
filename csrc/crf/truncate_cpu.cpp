// Launches the kernels of the truncation process on as many threads as there are, one workspace each.
#include "crf/truncate_cpu.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "common/memory.h"
#include "common/parallel.h"
#include "crf/truncate_math.h"
#include "crf/truncate_workspace.h"

#define HDROPS_ISA_SOURCE "crf/truncate_kernels_cpu.h"
#include "common/foreach_isa.h"

namespace hdrops {
namespace {

constexpr int64_t kPixelsPerThread = 16384;

template <class T>
void tasks(const TruncateParams& p, int64_t first, int64_t step, const T* input, const T* grad_output, T* output,
           TruncateWorkspace& ws) {
  HDROPS_ISA_CALL(truncate_tasks(p, first, step, input, grad_output, output, ws));
}

}  // namespace

template <class T>
void truncate_cpu(const TruncateParams& p, const T* input, const T* grad_output, T* output) {
  const int64_t pixels = p.planes * p.height * p.row();
  const int64_t threads = std::min(threads_worth(pixels, kPixelsPerThread), p.tasks());
  std::vector<std::unique_ptr<TruncateWorkspace>> workspaces;
  for (int64_t k = 0; k < threads; ++k) workspaces.push_back(std::make_unique<TruncateWorkspace>(p));
  advise_huge_pages(output, size_t(pixels) * sizeof(T));
  parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) tasks(p, k, threads, input, grad_output, output, *workspaces[k]);
  });
}

template void truncate_cpu(const TruncateParams&, const float*, const float*, float*);
template void truncate_cpu(const TruncateParams&, const double*, const double*, double*);
template void truncate_cpu(const TruncateParams&, const bfloat16*, const bfloat16*, bfloat16*);
template void truncate_cpu(const TruncateParams&, const float16*, const float16*, float16*);

}  // namespace hdrops
