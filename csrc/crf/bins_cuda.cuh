// Sums per bin over the pixels of an image, bitwise repeatable and without atomics.
//
// Every warp has bins of its own in shared memory. A step adds one pixel of each lane: lanes of one bin find each other
// (match), add up along a tree of fixed shape, and the first of them adds the sum to the bin. Cost and order of the
// additions hardly depend on the image: a flat one takes five rounds of the tree, a noisy one two.
//
// The warps' bins are in the type of the pixels' sums (float but for double data) and are emptied, after kStepsPerFlush
// steps, in the order of the warps into the block's totals, in double: a saturated sky under a mean loss adds one
// number millions of times, and in float every addition would err to the same side. At its end each block writes its
// totals as a row of doubles; add_rows sums the rows of a curve, in an order that depends on their number alone.
//
// Bins that do not fit shared memory are divided into windows, and the image is read once for each window.
//
// Shared memory of a block: totals [window, sums] double, then the warps' bins [8, window, sums].
#pragma once
#include "crf/runs_cuda.cuh"
#include "crf/shared_bytes_cuda.h"

namespace hdrops {

constexpr int kBinWarps = kRunThreads / 32;
constexpr int kStepsPerFlush = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The bins of one block: entries [begin, begin + count) of the image's.
struct BinWindow {
  int begin, count;
};

// Sum over the warp, along a tree of fixed shape; all lanes get it.
template <class A>
__device__ __forceinline__ A warp_sum(A value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

template <class A, int kSums>
class BlockBins {
 public:
  using Sums = Vector<A, kSums>;

  // Called by all threads of the block, like clear, pause and write.
  __device__ __forceinline__ BlockBins(BinWindow window, double* shared) : window_(window), totals_(shared) {
    bins_ = reinterpret_cast<Sums*>(shared + int64_t(window.count) * kSums);
    lane_ = int(threadIdx.x) & 31;
  }

  __device__ void clear() {
    for (int i = int(threadIdx.x); i < window_.count * kSums; i += int(blockDim.x)) totals_[i] = 0;
    for (int i = int(threadIdx.x); i < window_.count * kBinWarps; i += int(blockDim.x)) bins_[i] = Sums{};
    steps_ = 0;
    __syncthreads();
  }

  // Adds each lane's value to its bin if it counts. All lanes of the warp together.
  __device__ __forceinline__ void add(int bin, Sums value, bool counts) {
    const int at = bin - window_.begin;
    counts = counts && unsigned(at) < unsigned(window_.count);
    ++steps_;
    if (!__any_sync(kAllLanes, counts)) return;
    const unsigned self = 1u << lane_;
    const unsigned peers = __match_any_sync(kAllLanes, counts ? at : -1 - lane_);
    unsigned rank = __popc(peers & (self - 1)), later = peers & ~(self | (self - 1));
    const bool first = rank == 0;
    if (peers == kAllLanes) {  // a flat image: a tree of fewer instructions
#pragma unroll
      for (int s = 0; s < kSums; ++s) value.value[s] = warp_sum(value.value[s]);
      later = 0;
    }
    // Each round, lanes of even rank take over from the next of their peers, which are then done, and ranks halve.
    while (__any_sync(kAllLanes, later != 0)) {
      const int next = __ffs(int(later)) - 1;
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
        const A other = __shfl_sync(kAllLanes, value.value[s], next & 31);
        if (later != 0) value.value[s] += other;
      }
      later &= ~__ballot_sync(kAllLanes, rank & 1);
      rank >>= 1;
    }
    if (counts && first) {
      Sums* bin_sums = bins_ + (int(threadIdx.x) >> 5) * window_.count + at;
      Sums sums = *bin_sums;
#pragma unroll
      for (int s = 0; s < kSums; ++s) sums.value[s] += value.value[s];
      *bin_sums = sums;
    }
    __syncwarp();
  }

  // To be called every few steps. All warps have made the same number of steps.
  __device__ __forceinline__ void pause() {
    if (steps_ >= kStepsPerFlush) flush();
  }

  // The block's row of sums, of which this is the window.
  __device__ void write(double* row) {
    flush();
    for (int i = int(threadIdx.x); i < window_.count * kSums; i += int(blockDim.x)) {
      row[int64_t(window_.begin) * kSums + i] = totals_[i];
    }
  }

 private:
  __device__ void flush() {
    __syncthreads();
    for (int i = int(threadIdx.x); i < window_.count; i += int(blockDim.x)) {
      Sums sums[kBinWarps];
#pragma unroll
      for (int warp = 0; warp < kBinWarps; ++warp) {
        sums[warp] = bins_[warp * window_.count + i];
        bins_[warp * window_.count + i] = Sums{};
      }
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
#pragma unroll
        for (int half = kBinWarps / 2; half > 0; half /= 2) {
          for (int warp = 0; warp < half; ++warp) sums[warp].value[s] += sums[warp + half].value[s];
        }
        totals_[i * kSums + s] += double(sums[0].value[s]);
      }
    }
    steps_ = 0;
    __syncthreads();
  }

  BinWindow window_;
  double* totals_;
  Sums* bins_;
  int lane_, steps_ = 0;
};

// How bins are laid over blocks, by the sizes and the device alone.
struct BinPlan {
  int64_t entries;  // bins of one row
  int sums;         // of one bin
  int window, windows;
  size_t shared_bytes;            // of a block, besides what the caller adds
  int blocks_per_multiprocessor;  // that fit at a time

  HDROPS_HD int64_t row() const { return entries * sums; }
  HDROPS_HD BinWindow at(int index) const {
    const int64_t begin = int64_t(index) * window;
    return {int(begin), int(entries - begin < window ? entries - begin : window)};
  }
};

inline BinPlan plan_bins(int64_t entries, int sums, size_t sum_bytes, int64_t extra_bytes) {
  const int64_t per_entry = int64_t(sums) * (int64_t(sizeof(double)) + kBinWarps * int64_t(sum_bytes));
  const int64_t memory = shared_bytes_per_block();
  const int64_t most = (memory - extra_bytes) / per_entry;
  BinPlan plan{entries, sums, 0, 0, 0, 1};
  plan.windows = int(ceil_div(entries, most));
  plan.window = int(ceil_div<int64_t>(entries, plan.windows));
  plan.shared_bytes = size_t(plan.window * per_entry);
  const int64_t fit = (memory + 1024) / (int64_t(plan.shared_bytes) + extra_bytes + 1024);
  plan.blocks_per_multiprocessor = int(fit < 1 ? 1 : fit > 4 ? 4 : fit);
  return plan;
}

// The rows of doubles that make up one curve's sums: `count` rows, in runs of `run` that lie `stride` rows apart. Curve
// k = image * channels + channel begins at row image * image_stride + channel * channel_stride, where in a row its
// sums begin at column channel * channel_columns.
struct BinRows {
  unsigned count, run;
  int64_t stride;
  int64_t channels, image_stride, channel_stride, channel_columns;
};

// Totals [curves, columns] = sums of rows [row_size]. A block: 32 columns of one curve; each of its 16 warps sums every
// 16th row, and the first adds up the warps' sums, in order. Shared memory: 16 x 32 doubles.
constexpr int kRowWarps = 16;

static __global__ __launch_bounds__(32 * kRowWarps) void add_rows_kernel(const double* rows, int64_t row_size,
                                                                         BinRows of, int64_t columns, double* totals) {
  double* sums = shared_memory<double>();
  const int lane = int(threadIdx.x) & 31, warp = int(threadIdx.x) >> 5;
  const int64_t blocks = (columns + 31) / 32, curve = blockIdx.x / blocks;
  const int64_t column = blockIdx.x % blocks * 32 + lane;
  const int64_t image = curve / of.channels, channel = curve % of.channels;
  const double* first =
      rows + (image * of.image_stride + channel * of.channel_stride) * row_size + channel * of.channel_columns + column;
  double sum = 0;
  if (column < columns) {
#pragma unroll 4
    for (unsigned r = unsigned(warp); r < of.count; r += kRowWarps) {
      sum += first[(int64_t(r / of.run) * of.stride + r % of.run) * row_size];
    }
  }
  sums[warp * 32 + lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= columns) return;
  for (int other = 1; other < kRowWarps; ++other) sum += sums[other * 32 + lane];
  totals[curve * columns + column] = sum;
}

inline void add_rows(const double* rows, int64_t row_size, const BinRows& of, int64_t curves, int64_t columns,
                     double* totals, cudaStream_t stream) {
  const Grid grid{dim3(unsigned(curves * ceil_div<int64_t>(columns, 32))), dim3(32 * kRowWarps),
                  32 * kRowWarps * sizeof(double)};
  launch(add_rows_kernel, grid, stream, rows, row_size, of, columns, totals);
}

}  // namespace hdrops
