// Exposure merging on the CPU. T is the stack's element, Out the radiance's, A the type sums are kept in.
#pragma once
#include "crf/merge_params.h"

namespace hdrops {

template <class T, class Out, class A>
void merge_forward_cpu(const MergeParams<A>& params, Out* output);

// grad_output lies as the output does. What gradients point to holds one row of partial sums for each of `tasks`.
template <class T, class Out, class A>
void merge_backward_cpu(const MergeParams<A>& params, const MergeTasks& tasks, const Out* grad_output,
                        const MergeGradients& gradients);

}  // namespace hdrops
