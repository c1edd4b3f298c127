// To and from the layouts of the backward kernels (backward_samples_cuda.cuh: channels last, in padded runs).
//
// pack_channels and finish_input move 32 pixels x 32 channels a block through shared memory (4 KB; 8 KB for double), so
// that both sides are read and written along the lanes, whichever of the tensor's dimensions lies last.
#pragma once
#include "common/gradient_sum_cuda.cuh"
#include "deform_conv2d/backward_samples_cuda.cuh"

namespace hdrops::deform_conv2d {

constexpr int kMoveTile = 32, kMoveThreads = 256, kMovePitch = kMoveTile + 1;

// A tensor [images, channels, pixels], channels last in memory or not, whose channels are packed in runs.
struct ChannelPlanes {
  int64_t images, channels, pixels;
  bool channels_last;
  Runs runs;

  HDROPS_HD int64_t tiles_across() const { return ceil_div<int64_t>(runs.total, kMoveTile); }
  HDROPS_HD int64_t tiles_down() const { return ceil_div<int64_t>(pixels, kMoveTile); }
  // Position of an element in the tensor.
  HDROPS_HD int64_t at(int64_t image, int64_t pixel, int64_t channel) const {
    return channels_last ? (image * pixels + pixel) * channels + channel
                         : (image * channels + channel) * pixels + pixel;
  }
  HDROPS_HD int64_t packed_at(int64_t image, int64_t pixel, int64_t position) const {
    return (image * pixels + pixel) * runs.total + position;
  }
  // The channel at a packed position; none: -1.
  HDROPS_HD int64_t channel(int64_t position) const {
    bool exists = position < runs.total && position % runs.padded < runs.run;
    return exists ? position / runs.padded * runs.run + position % runs.padded : -1;
  }
};

// A block's tile and this thread's place in it. A tile's elements are visited row by row, 32 lanes along the side that
// is contiguous in memory: `along_channels` for the packed layout, and for the tensor if channels last.
struct MoveTile {
  int64_t image, first_pixel, first_position;

  __device__ __forceinline__ static MoveTile mine(const ChannelPlanes& planes) {
    int64_t block = blockIdx.x, across = planes.tiles_across(), down = planes.tiles_down();
    return {block / across / down, block / across % down * kMoveTile, block % across * kMoveTile};
  }
  __device__ __forceinline__ static int pixel(int line, bool along_channels) {
    return along_channels ? line : int(threadIdx.x) % kMoveTile;
  }
  __device__ __forceinline__ static int position(int line, bool along_channels) {
    return along_channels ? int(threadIdx.x) % kMoveTile : line;
  }
};

template <class T>
__global__ void __launch_bounds__(kMoveThreads) pack_channels(ChannelPlanes planes, const T* source, T* target) {
  T* tile = shared_memory<T>();  // [pixel][position]
  const MoveTile mine = MoveTile::mine(planes);
  for (int line = threadIdx.x / kMoveTile; line < kMoveTile; line += kMoveThreads / kMoveTile) {
    int pixel = mine.pixel(line, planes.channels_last), position = mine.position(line, planes.channels_last);
    int64_t from = mine.first_pixel + pixel, channel = planes.channel(mine.first_position + position);
    bool exists = from < planes.pixels && channel >= 0;
    tile[pixel * kMovePitch + position] = exists ? source[planes.at(mine.image, from, channel)] : T{};
  }
  __syncthreads();
  for (int line = threadIdx.x / kMoveTile; line < kMoveTile; line += kMoveThreads / kMoveTile) {
    int pixel = mine.pixel(line, true), position = mine.position(line, true);
    int64_t to = mine.first_pixel + pixel, place = mine.first_position + position;
    if (to < planes.pixels && place < planes.runs.total) {
      target[planes.packed_at(mine.image, to, place)] = tile[pixel * kMovePitch + position];
    }
  }
}

// grad_input from its sums.
template <class T, class Sum>
__global__ void __launch_bounds__(kMoveThreads) finish_input(ChannelPlanes planes, Sum sum, T* grad_input) {
  T* tile = shared_memory<T>();  // [pixel][position]
  const MoveTile mine = MoveTile::mine(planes);
  sum.prepare();
  for (int line = threadIdx.x / kMoveTile; line < kMoveTile; line += kMoveThreads / kMoveTile) {
    int pixel = mine.pixel(line, true), position = mine.position(line, true);
    int64_t from = mine.first_pixel + pixel, place = mine.first_position + position;
    if (from < planes.pixels && planes.channel(place) >= 0) {
      tile[pixel * kMovePitch + position] = store_as<T>(sum.value(planes.packed_at(mine.image, from, place)));
    }
  }
  __syncthreads();
  for (int line = threadIdx.x / kMoveTile; line < kMoveTile; line += kMoveThreads / kMoveTile) {
    int pixel = mine.pixel(line, planes.channels_last), position = mine.position(line, planes.channels_last);
    int64_t to = mine.first_pixel + pixel, channel = planes.channel(mine.first_position + position);
    if (to < planes.pixels && channel >= 0) {
      grad_input[planes.at(mine.image, to, channel)] = tile[pixel * kMovePitch + position];
    }
  }
}

template <class T>
Grid move_grid(const ChannelPlanes& planes) {
  return {dim3(unsigned(planes.images * planes.tiles_down() * planes.tiles_across())), dim3(kMoveThreads),
          kMoveTile * kMovePitch * sizeof(T)};
}

// weight [O, C / groups, K] to [group][tap][output][channel], padded: an element of the result a thread.
template <class T>
__global__ void __launch_bounds__(kMoveThreads)
    pack_weight(const T* weight, int64_t groups, int64_t taps, int64_t outputs, int64_t padded_outputs,
                int64_t channels, int64_t padded_channels, Runs runs, T* target) {
  int64_t index = int64_t(blockIdx.x) * kMoveThreads + threadIdx.x;
  if (index >= groups * taps * padded_outputs * padded_channels) return;
  int64_t position = index % padded_channels, rest = index / padded_channels;
  int64_t output = rest % padded_outputs, tap = rest / padded_outputs % taps, group = rest / padded_outputs / taps;
  int64_t channel = position / runs.padded * runs.run + position % runs.padded;
  bool exists = output < outputs && position % runs.padded < runs.run;
  target[index] = exists ? weight[((group * outputs + output) * channels + channel) * taps + tap] : T{};
}

}  // namespace hdrops::deform_conv2d
