// Gradients of weight and bias of a deformable convolution, on the GPU: bitwise repeatable.
//
// A block owns one tile of the weight's gradient, kRows outputs x kColumns channels of a tap and weight group (64 x 64;
// 32 x 32 for double), and one of several splits of all output pixels. kDepth pixels at a time it gathers the columns
// (mask * bilinear samples, by 16-byte vectors of channels) and copies grad_output to shared memory, and multiplies
// grad_output^T * columns; the sums stay in registers until the split's end, and are then written to the workspace.
// A second kernel adds up the splits in order. The bias's gradient: sums of grad_output over splits of the pixels, a
// thread a vector of outputs and every kth pixel, then the same second step.
//
// Columns of 16-bit data are rounded to it before the product, as the operands of matrix units must be.
// Shared memory of a block: both operands (9 KB each) and the samples (20 to 32 bytes a pixel and offset group of the
// chunk): 20 KB in 16-bit formats with one offset group.
// The splits' sums: at most 4 blocks a multiprocessor of 16 KB each (8.7 MB on 132 of them), or one weight's worth, and
// never more than a 512th of the columns times the outputs of a weight group.
#pragma once
#include "deform_conv2d/backward_product_cuda.cuh"
#include "deform_conv2d/backward_samples_cuda.cuh"

namespace hdrops::deform_conv2d {

template <class T>
struct WeightSide {
  using Real = device_acc_t<T>;
  SampleSource<T> samples;
  int64_t image_pixels;
  int batch, steps_per_image;         // steps of kDepth pixels
  int channels, outputs;              // padded, of all groups: strides of input and grad_output
  int group_channels, group_outputs;  // padded, of one weight group
  int offset_group_channels;          // padded, of one offset group
  int groups;
  int chunks_per_group, output_tiles;  // of a weight group: tiles of kColumns channels and kRows outputs
  int offset_groups_per_chunk;         // at most
  int splits;
  const T *input, *grad_output;  // channels last
  Real* sums;                    // [split][group][tap][output][channel]

  int64_t units() const { return int64_t(groups) * output_tiles * samples.taps * chunks_per_group; }
  HDROPS_HD int64_t split_size() const { return int64_t(groups) * samples.taps * group_outputs * group_channels; }
};

// What a block computes: a tile of the weight's gradient, and from which steps.
struct WeightTile {
  int split, tap, group, first_output, first_channel, width;  // the last three among the group's

  template <class T>
  __device__ __forceinline__ static WeightTile mine(const WeightSide<T>& p) {
    constexpr int kRows = TileShape<T>::kRows, kColumns = TileShape<T>::kColumns;
    int index = blockIdx.x;
    int chunk = index % p.chunks_per_group;
    index /= p.chunks_per_group;
    int taps = int(p.samples.taps), tap = index % taps;
    index /= taps;
    int output_tile = index % p.output_tiles;
    index /= p.output_tiles;
    int first_channel = chunk * kColumns;
    return {index / p.groups,    tap,           index % p.groups,
            output_tile * kRows, first_channel, min(kColumns, p.group_channels - first_channel)};
  }
};

template <class T, class Product>
struct WeightMemory {
  using Real = device_acc_t<T>;
  using Shape = TileShape<T>;
  T *grad_output, *columns;
  Sample<Real>* samples;

  static constexpr int kOperandA = Shape::kDepth * Product::kStrideA, kOperandB = Shape::kDepth * Product::kStrideB;
  static size_t bytes(int offset_groups) {
    return (kOperandA + kOperandB) * sizeof(T) + offset_groups * Shape::kDepth * sizeof(Sample<Real>);
  }
  __device__ __forceinline__ static WeightMemory get() {
    T* operands = shared_memory<T>();
    return {operands, operands + kOperandA, reinterpret_cast<Sample<Real>*>(operands + kOperandA + kOperandB)};
  }
};

// columns[pixel, channel] of a tile: a thread takes one vector of channels of every kth pixel.
template <class T, class Product>
__device__ __forceinline__ void gather_columns(const WeightSide<T>& p, const PixelTile& tile,
                                               const Sample<device_acc_t<T>>* samples, int first_channel, int width,
                                               T* columns) {
  using Real = device_acc_t<T>;
  constexpr int kVector = kVector16<T>, kLanes = TileShape<T>::kColumns / kVector;
  int channel = threadIdx.x % kLanes * kVector;
  int place = first_channel + channel;
  bool exists = channel < width;
  int plan = exists ? place / p.offset_group_channels - first_channel / p.offset_group_channels : 0;
  samples += plan * TileShape<T>::kDepth;
  const T* image = p.input + tile.image * p.image_pixels * p.channels + place;
#pragma unroll 1
  for (int pixel = threadIdx.x / kLanes; pixel < TileShape<T>::kDepth; pixel += kProductThreads / kLanes) {
    Vector<T, kVector> column{};
    const Sample<Real>& sample = samples[pixel];
    if (exists && sample.row != sample.kOutside) {
      auto corners =
          CellVectors<T>::load(image, p.channels, int64_t(p.samples.width) * p.channels, Cell::of(p.samples, sample));
      Real x = sample.fraction_x, upper = sample.mask * (1 - sample.fraction_y),
           lower = sample.mask * sample.fraction_y;
      const Real weight[4] = {upper * (1 - x), upper * x, lower * (1 - x), lower * x};
#pragma unroll
      for (int c = 0; c < kVector; ++c) {
        Real value = 0;
#pragma unroll
        for (int k = 0; k < 4; ++k) value += weight[k] * corners.value(k, c);
        column.value[c] = store_as<T>(value);
      }
    }
    *reinterpret_cast<Vector<T, kVector>*>(columns + pixel * Product::kStrideB + channel) = column;
  }
}

// The tile after this one, in the same image or the next.
template <class T>
__device__ __forceinline__ PixelTile next_tile(const WeightSide<T>& p, const PixelTile& tile) {
  constexpr int kDepth = TileShape<T>::kDepth;
  bool same_image = tile.first + kDepth < p.samples.out_pixels;
  return PixelTile::at(p.samples, same_image ? tile.image : tile.image + 1, same_image ? tile.first + kDepth : 0,
                       kDepth);
}

template <class T, class Product>
__device__ __forceinline__ void run_weight_tile(const WeightSide<T>& p) {
  using Real = device_acc_t<T>;
  using Shape = TileShape<T>;
  constexpr int kDepth = Shape::kDepth;
  auto memory = WeightMemory<T, Product>::get();
  const WeightTile target = WeightTile::mine(p);
  const int first_channel = target.group * p.group_channels + target.first_channel;
  const int first_group = first_channel / p.offset_group_channels;
  const int groups = (first_channel + target.width - 1) / p.offset_group_channels - first_group + 1;
  const int outputs = min(p.group_outputs - target.first_output, Shape::kRows);

  const int64_t steps = int64_t(p.batch) * p.steps_per_image, begin = target.split * steps / p.splits;
  int remaining = int((target.split + 1) * steps / p.splits - begin);
  auto tile = PixelTile::at(p.samples, int(begin / p.steps_per_image), begin % p.steps_per_image * kDepth, kDepth);
  Product product;
  product.clear();
  if (remaining > 0) {
    write_samples<T, Real, kDepth, kProductThreads>(p.samples, tile, target.tap, first_group, groups, memory.samples);
  }
  for (; remaining > 0; --remaining) {
    __syncthreads();  // the samples are there, and everyone is done with the operands before
    const T* grad_output = p.grad_output + (tile.image * p.samples.out_pixels + tile.first) * p.outputs +
                           target.group * p.group_outputs + target.first_output;
    copy_tile_async<T, kDepth, Shape::kRows, Product::kStrideA>(memory.grad_output, grad_output, p.outputs, tile.count,
                                                                outputs);
    cp_async_commit();
    gather_columns<T, Product>(p, tile, memory.samples, first_channel, target.width, memory.columns);
    cp_async_wait<0>();
    __syncthreads();  // the operands are there, and everyone is done with the samples
    tile = next_tile(p, tile);
    if (remaining > 1) {
      write_samples<T, Real, kDepth, kProductThreads>(p.samples, tile, target.tap, first_group, groups, memory.samples);
    }
    product.multiply(memory.grad_output, memory.columns, kDepth);
  }
  Real* sums = p.sums + target.split * p.split_size() +
               ((int64_t(target.group) * p.samples.taps + target.tap) * p.group_outputs + target.first_output) *
                   p.group_channels +
               target.first_channel;
  product.store(sums, p.group_channels, outputs, target.width);
}

template <class T, class Product>
__global__ void __launch_bounds__(kProductThreads, 2) weight_sums(WeightSide<T> p) {
  if constexpr (Product::kRunsHere) {
    run_weight_tile<T, Product>(p);
  } else {
    __trap();  // the host chose another product for this device
  }
}

// grad_weight [O, C / groups, K] from the splits' sums, an element a thread, channels fastest.
template <class T>
__global__ void __launch_bounds__(kProductThreads)
    reduce_weight(WeightSide<T> p, Runs channels, int64_t group_channels, int64_t group_outputs, T* grad_weight) {
  using Real = device_acc_t<T>;
  int64_t index = int64_t(blockIdx.x) * kProductThreads + threadIdx.x;
  if (index >= int64_t(p.groups) * p.samples.taps * group_outputs * group_channels) return;
  int64_t channel = index % group_channels, output = index / group_channels % group_outputs;
  int64_t tap = index / group_channels / group_outputs % p.samples.taps;
  int64_t group = index / group_channels / group_outputs / p.samples.taps;
  const Real* sums = p.sums + ((group * p.samples.taps + tap) * p.group_outputs + output) * p.group_channels +
                     channels.position(channel);
  Real sum = 0;
  for (int split = 0; split < p.splits; ++split) sum += sums[split * p.split_size()];
  grad_weight[((group * group_outputs + output) * group_channels + channel) * p.samples.taps + tap] = store_as<T>(sum);
}

// Fixed by the shapes and the device, so that the result is repeatable.
template <class T>
int count_splits(const WeightSide<T>& p) {
  constexpr int kDepth = TileShape<T>::kDepth;
  int64_t most = ceil_div<int64_t>(int64_t(p.batch) * p.steps_per_image, 512 / kDepth);
  int64_t wanted = 4 * device_multiprocessors() / p.units();
  return int(wanted < 1 ? 1 : wanted < most ? wanted : most);
}

template <class T, class Product>
void launch_weight_sums(const WeightSide<T>& side, cudaStream_t stream) {
  Grid grid{dim3(unsigned(side.units() * side.splits)), dim3(kProductThreads),
            WeightMemory<T, Product>::bytes(side.offset_groups_per_chunk)};
  launch(weight_sums<T, Product>, grid, stream, side);
}

template <class T>
void launch_reduce_weight(const WeightSide<T>& side, const Params& p, const Runs& channels, cudaStream_t stream) {
  int64_t count = p.out_channels * (p.in_channels / p.groups) * p.taps();
  Grid grid{dim3(unsigned(ceil_div<int64_t>(count, kProductThreads))), dim3(kProductThreads)};
  launch(reduce_weight<T>, grid, stream, side, channels, p.in_channels / p.groups, p.out_channels / p.groups,
         static_cast<T*>(p.grad_weight));
}

// The bias's gradient. A block sums kBiasLanes vectors of outputs over one split of the pixels.
constexpr int kBiasLanes = 8, kBiasSlots = kProductThreads / kBiasLanes;

template <class T>
__global__ void __launch_bounds__(kProductThreads)
    bias_sums(const T* grad_output, int64_t pixels, int64_t pixels_per_split, int64_t outputs, int splits,
              device_acc_t<T>* sums) {
  using Real = device_acc_t<T>;
  constexpr int kVector = kVector16<T>, kWidth = kBiasLanes * kVector;
  Real* shared = shared_memory<Real>();  // [kBiasSlots][kWidth]
  int64_t split = blockIdx.x % unsigned(splits), first = blockIdx.x / unsigned(splits) * int64_t(kWidth);
  int lane = threadIdx.x % kBiasLanes, slot = threadIdx.x / kBiasLanes;
  int64_t output = first + lane * kVector, begin = split * pixels_per_split;
  int64_t end = begin + pixels_per_split < pixels ? begin + pixels_per_split : pixels;
  Real sum[kVector] = {};
  for (int64_t pixel = begin + slot; output < outputs && pixel < end; pixel += kBiasSlots) {
    auto values = load_global(reinterpret_cast<const Vector<T, kVector>*>(grad_output + pixel * outputs + output));
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum[i] += load_as(values.value[i]);
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) shared[slot * kWidth + lane * kVector + i] = sum[i];
  __syncthreads();
  if (threadIdx.x >= kWidth || first + threadIdx.x >= outputs) return;
  Real total = 0;
  for (int i = 0; i < kBiasSlots; ++i) total += shared[i * kWidth + threadIdx.x];
  sums[split * outputs + first + threadIdx.x] = total;
}

template <class T>
__global__ void __launch_bounds__(kProductThreads)
    reduce_bias(const device_acc_t<T>* sums, int splits, Runs outputs, int64_t count, T* grad_bias) {
  int64_t output = int64_t(blockIdx.x) * kProductThreads + threadIdx.x;
  if (output >= count) return;
  device_acc_t<T> sum = 0;
  for (int split = 0; split < splits; ++split) sum += sums[split * outputs.total + outputs.position(output)];
  grad_bias[output] = store_as<T>(sum);
}

inline int count_bias_splits(const Params& p) {
  int64_t most = ceil_div<int64_t>(p.batch * p.out_pixels(), 16 * kBiasSlots), wanted = 4 * device_multiprocessors();
  return int(wanted < most ? wanted : most);
}

template <class T>
void launch_bias(const Params& p, const Runs& outputs, const T* grad_output, device_acc_t<T>* sums,
                 cudaStream_t stream) {
  constexpr int kWidth = kBiasLanes * kVector16<T>;
  int splits = count_bias_splits(p);
  Grid grid{dim3(unsigned(ceil_div<int64_t>(outputs.total, kWidth) * splits)), dim3(kProductThreads),
            kBiasSlots * kWidth * sizeof(device_acc_t<T>)};
  int64_t pixels = p.batch * p.out_pixels();
  int64_t pixels_per_split = splits > 0 ? ceil_div<int64_t>(pixels, splits) : 0;
  launch(bias_sums<T>, grid, stream, grad_output, pixels, pixels_per_split, outputs.total, splits, sums);
  Grid second{dim3(unsigned(ceil_div<int64_t>(p.out_channels, kProductThreads))), dim3(kProductThreads)};
  launch(reduce_bias<T>, second, stream, static_cast<const device_acc_t<T>*>(sums), splits, outputs, p.out_channels,
         static_cast<T*>(p.grad_bias));
}

}  // namespace hdrops::deform_conv2d
