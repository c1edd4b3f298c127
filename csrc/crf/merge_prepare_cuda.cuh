// Exposure merging on CUDA (OP-10), the preparation: the host function that has it done, and what the kernels are told.
//
// Nothing of the bracket is known to the host, so two small kernels prepare the workspace: the frames' order by
// exposure, with the flags of each image, and for 8-bit codes a table of (w, ln g).
//
// An exposure that is not finite, or a weight that is negative or not finite, which the CPU refuses, makes the image
// NaN: the host would have to wait for the device to see it.
#pragma once
#include "crf/kernels_cuda.h"
#include "crf/merge_math.h"
#include "crf/runs_cuda.cuh"

namespace hdrops {

constexpr int kTied = 1, kInvalid = 2;  // flags of an image's exposures

// What the kernels are told beside the geometry. MergeParams' order and log_exposures are the sorted ones of the
// workspace; its curve is as given, and its tables are not used.
template <class A>
struct MergeLaunch {
  MergeParams<A> p;
  const int32_t* flags;            // [N|1] of the exposures
  const Vector<A, 2>* code_table;  // 8-bit codes: (w, ln g) [N|1, C|1, 256], with the curve's strides in curves
  int64_t code_stride_n, code_stride_c;
  // A stream is cut into parts of `part_length` elements.
  int64_t streams, stream_length, part_length, parts;
};

// Sorts the frames of one image by exposure, equal ones in the order given, and flags the image. One block an image.
template <class A>
__global__ __launch_bounds__(kRunThreads) void sort_frames_kernel(const A* log_exposures, int64_t frames,
                                                                  const A* weight, int64_t weights, int32_t* order,
                                                                  A* sorted, int32_t* flags) {
  const A* given = log_exposures + blockIdx.x * frames;
  int* flag = shared_memory<int>();
  if (threadIdx.x == 0) *flag = 0;
  __syncthreads();
  int found = 0;
  for (int64_t j = threadIdx.x; j < frames; j += blockDim.x) {
    const A time = given[j];
    if (!(time - time == 0)) found |= kInvalid;
    int64_t rank = 0;
    for (int64_t k = 0; k < frames; ++k) {
      // What is not finite counts as 0 here, so that the ranks are a permutation whatever the times are.
      const A other = given[k] - given[k] == 0 ? given[k] : A(0), own = time - time == 0 ? time : A(0);
      rank += other < own || (other == own && k < j);
      if (k != j && other == own) found |= kTied;
    }
    order[blockIdx.x * frames + rank] = int32_t(j);
    sorted[blockIdx.x * frames + rank] = time;
  }
  for (int64_t i = threadIdx.x; i < weights; i += blockDim.x) {
    if (!(weight[i] >= 0 && weight[i] - weight[i] == 0)) found |= kInvalid;
  }
  if (found != 0) atomicOr(flag, found);
  __syncthreads();
  if (threadIdx.x == 0) flags[blockIdx.x] = *flag;
}

// Curves [curves, length], or none (curve null): (w, ln g) of every code.
template <class A>
__global__ __launch_bounds__(kCodes8) void code_table_kernel(const A* curve, int64_t length, const A* weight,
                                                             int64_t weights, Vector<A, 2>* table) {
  const int code = int(threadIdx.x);
  const CodePlace in_weights = place_of_code(code, weights), in_curve = place_of_code(code, length);
  double response = code > 0 ? double(code) / (kCodes8 - 1) : kSmallestResponse;
  if (curve != nullptr) {
    const A* of_block = curve + blockIdx.x * length;
    response = between(positive_response(of_block[in_curve.lower]), positive_response(of_block[in_curve.upper]),
                       in_curve.fraction);
  }
  table[int64_t(blockIdx.x) * kCodes8 + code] = {
      A(between(weight[in_weights.lower], weight[in_weights.upper], in_weights.fraction)), A(log(response))};
}

// The workspace that the preparation fills: flags, order, times, and the tables of 8-bit codes.
struct MergeWorkspaceSizes {
  size_t flags, order, times, codes;
  size_t total() const { return flags + order + times + codes; }
};

template <class T, class A>
MergeWorkspaceSizes merge_workspace_sizes(const MergeParams<A>& p, const MergeTablesOf<A>& of) {
  const int64_t times = of.exposure_images * p.frames;
  const auto rounded = [](int64_t bytes) { return size_t(round_up<int64_t>(bytes, 16)); };
  return {rounded(of.exposure_images * 4), rounded(times * 4), rounded(times * int64_t(sizeof(A))),
          sizeof(T) == 1 ? rounded(of.curves() * kCodes8 * 2 * int64_t(sizeof(A))) : 0};
}

// Prepares the tables of a merge.
template <class T, class A>
MergeLaunch<A> prepare_merge(const MergeParams<A>& params, const MergeTablesOf<A>& of, void* workspace,
                             cudaStream_t stream) {
  const auto sizes = merge_workspace_sizes<T>(params, of);
  char* memory = static_cast<char*>(workspace);
  auto* flags = reinterpret_cast<int32_t*>(memory);
  auto* order = reinterpret_cast<int32_t*>(memory += sizes.flags);
  auto* times = reinterpret_cast<A*>(memory += sizes.order);
  auto* codes = reinterpret_cast<Vector<A, 2>*>(memory += sizes.times);
  MergeLaunch<A> merge{};
  MergeParams<A>& p = merge.p;
  p = params;
  p.order = order;
  p.log_exposures = times;
  p.exposure_stride_n = of.exposure_images > 1 ? p.frames : 0;
  p.curve_stride_n = of.curve_images > 1 ? of.curve_channels * p.curve_length : 0;
  p.curve_stride_c = of.curve_channels > 1 ? p.curve_length : 0;
  merge.flags = flags;
  launch(sort_frames_kernel<A>, {dim3(unsigned(of.exposure_images)), dim3(kRunThreads), sizeof(int)}, stream,
         of.log_exposures, p.frames, p.weight, p.weight_length, order, times, flags);
  if (sizeof(T) == 1) {
    merge.code_table = codes;
    merge.code_stride_n = of.curve_images > 1 ? of.curve_channels : 0;
    merge.code_stride_c = of.curve_channels > 1 ? 1 : 0;
    launch(code_table_kernel<A>, {dim3(unsigned(of.curves())), dim3(kCodes8)}, stream, p.curve, p.curve_length,
           p.weight, p.weight_length, codes);
  }
  return merge;
}

// Cuts the streams into parts of whole steps of a block, about `blocks` of them, by sizes and device alone.
template <class A>
void cut_streams(MergeLaunch<A>& merge, int64_t blocks, int64_t least, int64_t step) {
  const MergeParams<A>& p = merge.p;
  merge.streams = p.interleaved ? p.batch : p.batch * p.channels;
  merge.stream_length = p.interleaved ? p.pixels * p.channels : p.pixels;
  const int64_t wanted = ceil_div(merge.streams * merge.stream_length, blocks < 1 ? 1 : blocks);
  merge.part_length = round_up(wanted > least ? wanted : least, step);
  merge.parts = ceil_div(merge.stream_length, merge.part_length);
}

}  // namespace hdrops
