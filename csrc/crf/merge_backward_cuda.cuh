// Backward pass of exposure merging on CUDA. With d ln E / d v_j = m_j w_j / sum, v_j = ln g_j - ln t_j, and weights
// constant, every frame of an element gets q_j = grad E m_j w_j / sum: the exposure loses q_j, the curve gains q_j /
// g_j where the reading lies in it, the reading gains q_j g'_j / g_j.
//
// A thread takes the elements of 16 bytes through the frames twice: for ln E, then for the gradients; the second time
// the stack is in the cache. Both sums are bitwise repeatable: each warp has a sum of q per frame, in double, and the
// curve's bins are those of bins_cuda.cuh: (sum of q/g, of q/g times the fraction) per entry, or for 8-bit codes the
// sum of q per code, from which merge_code_gradient_kernel makes the curve's.
//
// Shared memory of a block: the bins, the warps' sums [8, P] where P <= 128 (else in the workspace), the tables.
#pragma once
#include "common/lut.h"
#include "crf/bins_cuda.cuh"
#include "crf/merge_cuda.cuh"

namespace hdrops {

constexpr int kMergeBackwardBlocks = 2;  // of a multiprocessor
constexpr int64_t kSharedFrames = 128;

template <class T>
constexpr int kMergeSums = sizeof(T) == 1 ? 1 : 2;

// What the kernel writes: rows of sums of each block, of its curve's bins and of each warp's frames.
template <class A>
struct MergeRows {
  void* stack;
  double* times;  // [streams, parts, warps, P], or null
  double* bins;   // [streams, parts, entries, sums]
  BinPlan plan;
};

template <class T, class Out, class A, bool kCurve>
struct MergeBackward {
  static constexpr int V = kMergeVector<T, Out>;
  using Bins = BlockBins<A, kMergeSums<T>>;

  const MergeStream<T, A>& s;
  const MergeTables<T, A>& tables;
  Bins& bins;
  T* grad_stack;      // or null
  double* warp_sums;  // of this warp [P], or null

  // Where frame j's gradient of the stream begins.
  __device__ __forceinline__ T* grad_frame(int64_t j) const {
    return grad_stack + ((s.image * s.p.frames + s.order[j]) * s.p.channels + s.plane) * s.p.pixels;
  }

  // What follows from q_j of an element whose reading has these terms: the reading's gradient; the curve's goes to the
  // bins, all lanes of the warp together.
  __device__ __forceinline__ A reading_gradient(const ReadingTerms<A>& terms, int channel, A q) {
    const int entry = channel * tables.channel + terms.lower;
    if constexpr (MergeTables<T, A>::kCodes) {
      if constexpr (kCurve) bins.add(entry, {q}, q != A(0));
      return A(0);
    } else {
      const A relative = q / terms.response;
      if constexpr (kCurve) bins.add(entry, {relative, relative * terms.fraction}, q != A(0));
      return relative * terms.slope;
    }
  }

  // Exposure j loses q, summed over the warp.
  __device__ __forceinline__ void time_gradient(int64_t j, A q) {
    if (warp_sums == nullptr) return;
    q = warp_sum(q);
    if (threadIdx.x % 32 == 0) warp_sums[j] -= double(q);
  }

  // Frame j's share in the plain elements: q = gain w share.
  __device__ __forceinline__ void plain_frame(const MergeVector<T, A, V>& vector, const A (&gain)[V], int64_t j) {
    const Vector<T, V> stored = vector.load(s, j);
    [[maybe_unused]] Vector<T, V> result;
    MergePlace at = vector.first;
    A sum = 0;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const auto terms = tables.terms(stored.value[k], at.channel);
      const A q = k < vector.count ? gain[k] * (terms.weight * s.share(j, at.pixel)) : A(0);
      sum += q;
      [[maybe_unused]] const A grad = reading_gradient(terms, at.channel, q);
      if constexpr (kMergeMax<T> == 1) result.value[k] = store_as<T>(grad);
      at = next_place(s.p, at);
    }
    if constexpr (kMergeMax<T> == 1) {
      if (grad_stack != nullptr) store_some(grad_frame(j) + vector.first.index, result, vector.count);
    }
    time_gradient(j, sum);
    if constexpr (kCurve) bins.pause();
  }

  // One element of each lane that has one, not plain: its frames share in it by their weights, or one has it all.
  __device__ __forceinline__ void slow_element(MergePlace at, bool exists, A grad) {
    MergeResult<A> result{A(0), A(1), -1, true};
    A gain = 0;
    if (exists) {
      result = slow_result(SlowElement<T, A>{tables, s, at});
      const bool number = result.log_radiance == result.log_radiance || s.invalid;
      gain = number ? grad * radiance_of(result.log_radiance) / result.total : A(0);
    }
#pragma unroll 1
    for (int64_t j = 0; j < s.p.frames; ++j) {
      const T stored = exists ? s.frame(j)[at.index] : T{};
      const auto terms = tables.terms(stored, at.channel);
      A q = 0;
      if (exists && result.chosen < 0) q = gain * (result.masked ? terms.weight * s.share(j, at.pixel) : terms.weight);
      if (exists && result.chosen == j) q = gain;
      [[maybe_unused]] const A grad_reading = reading_gradient(terms, at.channel, q);
      if constexpr (kMergeMax<T> == 1) {
        if (exists && grad_stack != nullptr) grad_frame(j)[at.index] = store_as<T>(grad_reading);
      }
      time_gradient(j, q);
    }
  }
};

template <class T, class Out, class A, bool kCurve>
__global__ __launch_bounds__(kRunThreads, kMergeBackwardBlocks) void merge_backward_kernel(
    const __grid_constant__ MergeLaunch<A> merge, const Out* grad_output, MergeRows<A> rows) {
  constexpr int V = kMergeVector<T, Out>;
  using Backward = MergeBackward<T, Out, A, kCurve>;
  const int64_t row = blockIdx.x / rows.plan.windows, index = row / merge.parts, part = row % merge.parts;
  const int window = int(blockIdx.x % rows.plan.windows), warp = int(threadIdx.x) / 32;
  const bool first_window = window == 0;
  char* shared = shared_memory<char>();
  typename Backward::Bins bins(rows.plan.at(window), shared_memory<double>());
  if constexpr (kCurve) bins.clear();
  shared += rows.plan.shared_bytes;

  // Each warp's sums, in shared memory if that is large enough for them.
  const int64_t frames = merge.p.frames;
  const bool sums_shared = frames <= kSharedFrames;
  double* warp_sums = nullptr;
  if (rows.times != nullptr && first_window) {
    double* of_warp = rows.times + (row * kBinWarps + warp) * frames;
    warp_sums = sums_shared ? reinterpret_cast<double*>(shared) + warp * frames : of_warp;
    for (int64_t j = threadIdx.x % 32; j < frames; j += 32) warp_sums[j] = 0;
    __syncwarp();
  }
  if (sums_shared) shared += kBinWarps * frames * int64_t(sizeof(double));

  const MergeStream<T, A> s(merge, index);
  const MergeTables<T, A> tables(merge, s.image, s.plane, shared);
  T* grad_stack = first_window ? static_cast<T*>(rows.stack) : nullptr;
  Backward backward{s, tables, bins, grad_stack, warp_sums};
  const int64_t begin = part * merge.part_length;
  const int64_t end = begin + merge.part_length < merge.stream_length ? begin + merge.part_length : merge.stream_length;
  for (int64_t first = begin; first < end; first += int64_t(kRunThreads) * V) {
    const int64_t i = first + int64_t(threadIdx.x) * V;
    const int count = i >= end ? 0 : end - i < V ? int(end - i) : V;
    const Out* grad = grad_output + index * merge.stream_length + i;
    MergeVector<T, A, V> vector{merge_place(merge.p, i), count, {}};
    vector.accumulate(tables, s);
    unsigned slow = vector.slow(s);
    A gain[V];
#pragma unroll
    for (int k = 0; k < V; ++k) {
      gain[k] = 0;
      if (k < count && (slow >> k & 1) == 0) {
        const A scale = load_as(grad[k]) * radiance_of(log_radiance_of(vector.sums[k]));
        gain[k] = scale / (vector.sums[k].weight + A(kMergeEpsilon));
      }
    }
#pragma unroll 1
    for (int64_t j = 0; j < frames; ++j) backward.plain_frame(vector, gain, j);
    for (; __any_sync(kAllLanes, slow != 0); slow &= slow - 1) {
      const int k = slow != 0 ? __ffs(int(slow)) - 1 : 0;
      backward.slow_element(vector.place(merge.p, k), slow != 0, slow != 0 ? load_as(grad[k]) : A(0));
    }
  }
  if (warp_sums != nullptr && sums_shared) {
    __syncwarp();
    double* of_warp = rows.times + (row * kBinWarps + warp) * frames;
    for (int64_t j = threadIdx.x % 32; j < frames; j += 32) of_warp[j] = warp_sums[j];
  }
  if constexpr (kCurve) bins.write(rows.bins + row * rows.plan.row());
}

// From the totals [images, P], by rank, to the frames as they were given.
template <class A>
__global__ void merge_time_gradient_kernel(MergeParams<A> p, const double* totals, int64_t count, A* grad) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t image = i / p.frames;
    grad[image * p.frames + p.order[i]] = A(totals[i]);
  }
}

// From the totals of each curve to its gradient, 0 where the entry was replaced.
template <class A>
__global__ void merge_curve_gradient_kernel(MergeParams<A> p, const double* totals, int64_t count, A* grad) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t entry = i % p.curve_length;
    const double* of_curve = totals + 2 * (i - entry);
    grad[i] = p.curve[i] > 0 ? A(linear_curve_gradient(of_curve, p.curve_length, entry)) : A(0);
  }
}

// The same from totals per 8-bit code [curves, 256].
template <class A>
__global__ void merge_code_gradient_kernel(MergeParams<A> p, const double* totals, int64_t count, A* grad) {
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t entry = i % p.curve_length, k = i / p.curve_length;
    const A* curve = p.curve + k * p.curve_length;
    double sum = 0;
    for (int code = 0; code < kCodes8; ++code) {
      const CodePlace place = place_of_code(code, p.curve_length);
      if (place.lower != entry && place.upper != entry) continue;
      const double relative =
          totals[k * kCodes8 + code] /
          between(positive_response(curve[place.lower]), positive_response(curve[place.upper]), place.fraction);
      if (place.lower == entry) sum += (1 - place.fraction) * relative;
      if (place.upper == entry) sum += place.fraction * relative;
    }
    grad[i] = curve[entry] > 0 ? A(sum) : A(0);
  }
}

// How the pass is cut, and what memory it takes.
template <class T, class Out, class A>
struct MergeBackwardPass {
  MergeLaunch<A> cut{};
  BinPlan plan{0, 0, 0, 1, 0, kMergeBackwardBlocks};
  size_t other_shared;  // bytes beside the bins
  MergeTablesOf<A> of;

  MergeBackwardPass(const MergeParams<A>& p, const MergeTablesOf<A>& of_, bool curve_wanted) : of(of_) {
    cut.p = p;
    const size_t sums = p.frames <= kSharedFrames ? size_t(kBinWarps * p.frames) * sizeof(double) : 0;
    other_shared = sums + size_t(table_bytes());
    if (curve_wanted) {
      const int64_t length = sizeof(T) == 1 ? kCodes8 : p.curve_length;
      plan = plan_bins(length * stream_curves(), kMergeSums<T>, sizeof(A), int64_t(other_shared));
    }
    constexpr int64_t kStep = int64_t(kRunThreads) * kMergeVector<T, Out>;
    const int64_t fit = plan.blocks_per_multiprocessor;
    const int64_t blocks = (fit < kMergeBackwardBlocks ? fit : kMergeBackwardBlocks) * device_multiprocessors();
    const int64_t least = 8 * plan.entries;
    cut_streams(cut, ceil_div<int64_t>(blocks, plan.windows), least > kStep ? least : kStep, kStep);
  }

  // Curves that a stream has.
  int64_t stream_curves() const { return cut.p.interleaved && of.curve_channels > 1 ? cut.p.channels : 1; }

  // What MergeTables takes of shared memory: as much as fits, and no more than there is.
  int64_t table_bytes() const {
    const int64_t entry = int64_t(sizeof(A));
    int64_t bytes = 0;
    const auto take = [&](int64_t more) { bytes += bytes + more <= kMergeTableBytes ? more : 0; };
    if (sizeof(T) == 1) {
      take(stream_curves() * kCodes8 * 2 * entry);
    } else {
      if (cut.p.weight_length > 3) take(cut.p.weight_length * entry);
      if (cut.p.curve != nullptr) take(stream_curves() * cut.p.curve_length * entry);
    }
    return bytes;
  }

  int64_t rows() const { return cut.streams * cut.parts; }
  size_t preparation() const { return merge_workspace_sizes<T>(cut.p, of).total(); }
  size_t time_rows() const { return size_t(rows() * kBinWarps * cut.p.frames) * sizeof(double); }
  size_t time_totals() const { return size_t(of.exposure_images * cut.p.frames) * sizeof(double); }
  size_t bin_rows() const { return size_t(rows() * plan.row()) * sizeof(double); }
  size_t bin_totals() const { return size_t(of.curves() * curve_columns()) * sizeof(double); }
  // Of one curve's totals.
  int64_t curve_columns() const { return plan.row() / stream_curves(); }
  size_t bytes() const { return preparation() + time_rows() + time_totals() + bin_rows() + bin_totals(); }
};

template <class T, class Out, class A>
size_t merge_backward_workspace_bytes(const MergeParams<A>& p, const MergeTablesOf<A>& of, bool curve_wanted) {
  return MergeBackwardPass<T, Out, A>(p, of, curve_wanted).bytes();
}

template <class T, class Out, class A>
void merge_backward_cuda(const MergeParams<A>& p, const MergeTablesOf<A>& of, const Out* grad_output,
                         const MergeOutputs<A>& gradients, void* workspace, cudaStream_t stream) {
  const bool curve_wanted = gradients.curve != nullptr;
  const MergeBackwardPass<T, Out, A> pass(p, of, curve_wanted);
  MergeLaunch<A> merge = prepare_merge<T>(p, of, workspace, stream);
  merge.streams = pass.cut.streams, merge.stream_length = pass.cut.stream_length;
  merge.part_length = pass.cut.part_length, merge.parts = pass.cut.parts;

  char* memory = static_cast<char*>(workspace) + pass.preparation();
  auto* time_rows = reinterpret_cast<double*>(memory);
  auto* time_totals = reinterpret_cast<double*>(memory += pass.time_rows());
  auto* bin_rows = reinterpret_cast<double*>(memory += pass.time_totals());
  auto* bin_totals = reinterpret_cast<double*>(memory += pass.bin_rows());
  const MergeRows<A> rows{gradients.stack, gradients.log_exposures != nullptr ? time_rows : nullptr, bin_rows,
                          pass.plan};
  const Grid grid{dim3(unsigned(pass.rows() * pass.plan.windows)), dim3(kRunThreads),
                  pass.plan.shared_bytes + pass.other_shared};
  if (curve_wanted) {
    launch(merge_backward_kernel<T, Out, A, true>, grid, stream, merge, grad_output, rows);
  } else {
    launch(merge_backward_kernel<T, Out, A, false>, grid, stream, merge, grad_output, rows);
  }

  const int64_t per_image = pass.rows() / merge.p.batch;  // rows of blocks
  if (gradients.log_exposures != nullptr) {
    const int64_t warps = per_image * kBinWarps, images = of.exposure_images > 1 ? 1 : merge.p.batch;
    const BinRows rows_of{unsigned(warps * images), unsigned(warps * images), 0, 1, warps, 0, 0};
    add_rows(time_rows, p.frames, rows_of, of.exposure_images, p.frames, time_totals, stream);
    const int64_t count = of.exposure_images * p.frames;
    launch(merge_time_gradient_kernel<A>, grid_over(count), stream, merge.p, time_totals, count,
           gradients.log_exposures);
  }
  if (curve_wanted) {
    // The rows of a curve: of its image or all, and of them those of its plane or all; the curves of an interleaved
    // stream lie side by side in its rows.
    const bool planes = !p.interleaved && of.curve_channels > 1;
    const int64_t run = planes ? merge.parts : per_image, images = of.curve_images > 1 ? 1 : merge.p.batch;
    const BinRows rows_of{unsigned(run * images),
                          unsigned(run),
                          per_image,
                          of.curve_channels,
                          per_image,
                          planes ? merge.parts : 0,
                          planes ? 0 : pass.curve_columns()};
    add_rows(bin_rows, pass.plan.row(), rows_of, of.curves(), pass.curve_columns(), bin_totals, stream);
    const int64_t count = of.curves() * p.curve_length;
    if (sizeof(T) == 1) {
      launch(merge_code_gradient_kernel<A>, grid_over(count), stream, merge.p, bin_totals, count, gradients.curve);
    } else {
      launch(merge_curve_gradient_kernel<A>, grid_over(count), stream, merge.p, bin_totals, count, gradients.curve);
    }
  }
}

}  // namespace hdrops
