// The host functions of the response-curve family on CUDA, as the bindings call them; their kernels are compiled in the
// .cu files beside the .cuh files that hold them.
#pragma once
#include "common/half.h"
#include "common/launch.h"
#include "crf/histogram_params.h"
#include "crf/lookup_params.h"
#include "crf/merge_params.h"
#include "crf/quantize_params.h"
#include "crf/truncate_params.h"

namespace hdrops {

template <class In, class Out>
void crf_lookup_cuda(const LookupParams& p, cudaStream_t stream);
template <class In, class Out>
size_t crf_lookup_backward_workspace_bytes(const LookupParams& p);
template <class In, class Out>
void crf_lookup_backward_cuda(const LookupParams& p, void* workspace, cudaStream_t stream);

template <class T>
size_t tent_workspace_bytes(const TentParams& p);
template <class T>
void tent_histogram_cuda(const TentParams& p, void* workspace, cudaStream_t stream);
template <class T>
void tent_histogram_backward_cuda(const TentParams& p, void* workspace, cudaStream_t stream);

template <class T>
size_t value_histogram_workspace_bytes(const ValueHistogramParams& p);
template <class T>
void value_histogram_cuda(const ValueHistogramParams& p, void* workspace, cudaStream_t stream);
template <class T>
void value_histogram_backward_cuda(const ValueHistogramParams& p, cudaStream_t stream);

template <class T>
void quantize_ste_cuda(const QuantizeParams& p, cudaStream_t stream);
template <class T>
void quantize_ste_backward_cuda(const QuantizeParams& p, cudaStream_t stream);

// The result into `output`, or with `grad_output` (else null) the input's gradient.
template <class T>
size_t truncate_workspace_bytes(const TruncateParams& p, bool backward);
template <class T>
void truncate_cuda(const TruncateParams& p, const T* input, const T* grad_output, T* output, void* workspace,
                   cudaStream_t stream);

// What the tables of a merge are given for: log_exposures [exposure_images, P], MergeParams' curve (as given, or null)
// [curve_images, curve_channels, L].
template <class A>
struct MergeTablesOf {
  const A* log_exposures;
  int64_t exposure_images, curve_images, curve_channels;
  int64_t curves() const { return curve_images * curve_channels; }
};

// MergeParams' order, log_exposures, curve strides and tables are left open. grad_output lies as the output does.
template <class T, class Out, class A>
size_t merge_forward_workspace_bytes(const MergeParams<A>& p, const MergeTablesOf<A>& of);
template <class T, class Out, class A>
void merge_forward_cuda(const MergeParams<A>& p, const MergeTablesOf<A>& of, Out* output, void* workspace,
                        cudaStream_t stream);
template <class T, class Out, class A>
size_t merge_backward_workspace_bytes(const MergeParams<A>& p, const MergeTablesOf<A>& of, bool curve_wanted);
template <class T, class Out, class A>
void merge_backward_cuda(const MergeParams<A>& p, const MergeTablesOf<A>& of, const Out* grad_output,
                         const MergeOutputs<A>& gradients, void* workspace, cudaStream_t stream);

}  // namespace hdrops
