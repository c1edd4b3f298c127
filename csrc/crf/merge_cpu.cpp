// Launches the kernels of exposure merging (merge_cpu.h) on as many threads as there are, one workspace each.
#include "crf/merge_cpu.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "common/memory.h"
#include "common/parallel.h"
#include "crf/merge_math.h"
#include "crf/merge_plan.h"
#include "crf/merge_workspace.h"

#define HDROPS_ISA_SOURCE "crf/merge_kernels_cpu.h"
#include "common/foreach_isa.h"

namespace hdrops {
namespace {

constexpr int64_t kReadingsPerThread = 32768;

template <class T, class Out, class A>
void forward_tasks(const MergeParams<A>& p, const MergeTasks& tasks, int64_t block, int64_t first, int64_t step,
                   Out* output, MergeWorkspace<T, A>& ws) {
  HDROPS_ISA_CALL(merge_forward_tasks(p, tasks, block, first, step, output, ws));
}

template <class T, class Out, class A>
void backward_tasks(const MergeParams<A>& p, const MergeTasks& tasks, int64_t block, int64_t first, int64_t step,
                    const Out* grad_output, const MergeGradients& gradients, MergeWorkspace<T, A>& ws) {
  HDROPS_ISA_CALL(merge_backward_tasks(p, tasks, block, first, step, grad_output, gradients, ws));
}

// Calls run(first task, step, workspace) so that every task is done once.
template <class T, class A, class F>
void on_threads(const MergeParams<A>& p, const MergeTasks& tasks, int64_t bins, const F& run) {
  const int64_t readings = p.batch * p.frames * p.channels * p.pixels;
  const int64_t threads = std::min(threads_worth(readings, kReadingsPerThread), tasks.count());
  const int64_t block = merge_block_length(p.channels, p.interleaved);
  std::vector<std::unique_ptr<MergeWorkspace<T, A>>> workspaces;
  for (int64_t k = 0; k < threads; ++k) {
    workspaces.push_back(std::make_unique<MergeWorkspace<T, A>>(p.frames, block, bins));
  }
  parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) run(k, threads, *workspaces[k]);
  });
}

}  // namespace

template <class T, class Out, class A>
void merge_forward_cpu(const MergeParams<A>& p, Out* output) {
  const MergeTasks tasks = merge_tasks(p.batch, p.channels, p.pixels, p.interleaved, 16384);
  const int64_t block = merge_block_length(p.channels, p.interleaved);
  advise_huge_pages(output, size_t(tasks.streams * tasks.stream_length) * sizeof(Out));
  on_threads<T>(p, tasks, 0, [&](int64_t first, int64_t step, MergeWorkspace<T, A>& ws) {
    forward_tasks(p, tasks, block, first, step, output, ws);
  });
}

template <class T, class Out, class A>
void merge_backward_cpu(const MergeParams<A>& p, const MergeTasks& tasks, const Out* grad_output,
                        const MergeGradients& gradients) {
  const int64_t block = merge_block_length(p.channels, p.interleaved);
  const int64_t bins = sizeof(T) == 1 ? (p.frames + 1) * p.channels * kCodes8 : 0;
  on_threads<T>(p, tasks, bins, [&](int64_t first, int64_t step, MergeWorkspace<T, A>& ws) {
    backward_tasks(p, tasks, block, first, step, grad_output, gradients, ws);
  });
}

#define HDROPS_INSTANTIATE(T, Out, A)                                                               \
  template void merge_forward_cpu<T, Out, A>(const MergeParams<A>&, Out*);                          \
  template void merge_backward_cpu<T, Out, A>(const MergeParams<A>&, const MergeTasks&, const Out*, \
                                              const MergeGradients&);
HDROPS_INSTANTIATE(uint8_t, float, float)
HDROPS_INSTANTIATE(uint8_t, double, double)
HDROPS_INSTANTIATE(uint16_t, float, float)
HDROPS_INSTANTIATE(uint16_t, double, double)
HDROPS_INSTANTIATE(float, float, float)
HDROPS_INSTANTIATE(double, double, double)
HDROPS_INSTANTIATE(bfloat16, bfloat16, float)
HDROPS_INSTANTIATE(float16, float16, float)

}  // namespace hdrops
