// Gradients of input, offset and mask of a deformable convolution, on the GPU.
//
// A block owns a tile of kRows consecutive output pixels of one image (64; 32 for double) and a part of the taps. For
// each of its taps and each chunk of kColumns channels of a weight group it
//   1. computes the columns' gradient, grad_output tile * weight of the tap, by the tile product, into shared memory;
//   2. reloads the samples' corners by 16-byte vectors of channels. A thread has one vector of a pixel; the lanes of a
//      pixel add up their shares of the offset's and the mask's gradient by shuffles, each offset group by itself, and
//      its first lane stores them: nobody else writes there. An offset group that goes on in the next chunk carries its
//      sums there through shared memory;
//   3. adds mask * bilinear weight * gradient to the input's gradient (gradient_sum_cuda.cuh) by reductions. A thread
//      walks along a run of pixels, and merges the right corners of a sample with the left ones of the next where the
//      two cells are neighbours: with smooth offsets that nearly halves the reductions.
// 2. and 3. run only if asked for. While they do, the operands of the next product are on their way to shared memory.
//
// Shared memory of a block: the operands (9 KB each), the columns' gradient (18 KB; 10 for double), the samples (20 to
// 32 bytes a pixel and offset group of the chunk) and 6 sums a pixel: 40 KB in 16-bit formats with one offset group.
// All is exact to the type of the sums, and 1. and 2. do not depend on the order of anything.
#pragma once
#include "common/gradient_sum_cuda.cuh"
#include "deform_conv2d/backward_product_cuda.cuh"
#include "deform_conv2d/backward_samples_cuda.cuh"

namespace hdrops::deform_conv2d {

template <class T>
struct InputSide {
  using Real = device_acc_t<T>;
  SampleSource<T> samples;
  int64_t image_pixels;
  int channels, outputs;              // padded, of all groups: strides of input and grad_output
  int group_channels, group_outputs;  // padded, of one weight group
  int offset_group_channels;          // padded, of one offset group
  int chunks_per_group, chunks;       // of kColumns channels
  int tiles_per_image, tap_parts;
  int offset_groups_per_chunk;            // at most
  const T *input, *grad_output, *weight;  // channels last; weight [group][tap][output][channel]
  void *grad_offset, *grad_mask;          // null: not wanted
  bool grad_input;
  FloatSum<Real> float_sum;
  FixedSum<Real> fixed_sum;
  bool fixed;
};

// A chunk of channels, all of one weight group.
struct Chunk {
  int group, first, width;  // first: among the group's channels

  template <class T>
  __device__ __forceinline__ static Chunk at(const InputSide<T>& p, int index) {
    constexpr int kColumns = TileShape<T>::kColumns;
    int group = index / p.chunks_per_group, first = index % p.chunks_per_group * kColumns;
    return {group, first, min(kColumns, p.group_channels - first)};
  }
  // Its first channel among all of them.
  template <class T>
  __device__ __forceinline__ int begin(const InputSide<T>& p) const {
    return group * p.group_channels + first;
  }
};

// One step of a block: a product's share of `kDepth` outputs.
struct Step {
  int tap, chunk, depth;

  template <class T>
  __device__ __forceinline__ void advance(const InputSide<T>& p, int depths) {
    if (++depth < depths) return;
    depth = 0;
    if (++chunk < p.chunks) return;
    chunk = 0, ++tap;
  }
};

template <class T, class Product>
struct InputMemory {
  using Real = device_acc_t<T>;
  using Shape = TileShape<T>;
  static constexpr int kGradientStride = Shape::kColumns + 32 / int(sizeof(Real));
  T *grad_output, *weight;
  Real* gradient;  // of the columns
  Real* carry;     // [2][3][kRows]: sums of the offset group that goes on in the next chunk, of even and odd chunks
  Sample<Real>* samples;

  static constexpr int kOperandA = Shape::kRows * Product::kStrideA, kOperandB = Shape::kDepth * Product::kStrideB;
  static constexpr size_t kFixedBytes =
      (kOperandA + kOperandB) * sizeof(T) + (Shape::kRows * kGradientStride + 6 * Shape::kRows) * sizeof(Real);
  static size_t bytes(int offset_groups) { return kFixedBytes + offset_groups * Shape::kRows * sizeof(Sample<Real>); }

  __device__ __forceinline__ static InputMemory get() {
    T* operands = shared_memory<T>();
    Real* reals = reinterpret_cast<Real*>(operands + kOperandA + kOperandB);
    Real* carry = reals + Shape::kRows * kGradientStride;
    return {operands, operands + kOperandA, reals, carry, reinterpret_cast<Sample<Real>*>(carry + 6 * Shape::kRows)};
  }
};

// Operands of a step; grad_output's stay if they are those of the step before.
template <class T, class Product>
__device__ __forceinline__ void load_operands(const InputSide<T>& p, const InputMemory<T, Product>& memory,
                                              const PixelTile& tile, const Step& step, bool keep_grad_output) {
  using Shape = TileShape<T>;
  Chunk chunk = Chunk::at(p, step.chunk);
  int output = step.depth * Shape::kDepth, outputs = p.group_outputs - output;
  if (!keep_grad_output) {
    const T* from = p.grad_output + (tile.image * p.samples.out_pixels + tile.first) * p.outputs +
                    chunk.group * p.group_outputs + output;
    copy_tile_async<T, Shape::kRows, Shape::kDepth, Product::kStrideA>(memory.grad_output, from, p.outputs, tile.count,
                                                                       outputs);
  }
  const T* from = p.weight +
                  ((int64_t(chunk.group) * p.samples.taps + step.tap) * p.group_outputs + output) * p.group_channels +
                  chunk.first;
  copy_tile_async<T, Shape::kDepth, Shape::kColumns, Product::kStrideB>(memory.weight, from, p.group_channels,
                                                                        min(outputs, Shape::kDepth), chunk.width);
  cp_async_commit();
}

// One lane's share of a sample's gradients by y, x and mask.
template <class Real>
struct SampleGradient {
  Real y, x, mask;
};

template <class T, class Real>
__device__ __forceinline__ SampleGradient<Real> sample_gradient(const CellVectors<T>& corners, const Real* gradient,
                                                                const Sample<Real>& sample) {
  Real dot[4] = {};
#pragma unroll
  for (int c = 0; c < kVector16<T>; ++c) {
    Real g = gradient[c];
#pragma unroll
    for (int k = 0; k < 4; ++k) dot[k] += g * corners.value(k, c);
  }
  Real y = sample.fraction_y, x = sample.fraction_x;
  Real low = (1 - x) * dot[0] + x * dot[1], high = (1 - x) * dot[2] + x * dot[3];
  Real slope = (1 - y) * (dot[1] - dot[0]) + y * (dot[3] - dot[2]);
  return {sample.mask * (high - low), sample.mask * slope, (1 - y) * low + y * high};
}

// Sums over the lanes of a pixel that belong to this lane's offset group and come after it: `remaining` with itself.
template <int kLanes, class Real>
__device__ __forceinline__ Real sum_lanes(Real value, int remaining) {
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    Real other = __shfl_down_sync(0xffffffffu, value, distance, kLanes);
    if (distance < remaining) value += other;
  }
  return value;
}

// Step 2 of the head comment.
template <class T, class Product>
__device__ __forceinline__ void offset_gradients(const InputSide<T>& p, const InputMemory<T, Product>& memory,
                                                 const PixelTile& tile, const Step& step, const Chunk& chunk) {
  using Real = device_acc_t<T>;
  using Memory = InputMemory<T, Product>;
  constexpr int kRows = TileShape<T>::kRows, kVector = kVector16<T>, kLanes = TileShape<T>::kColumns / kVector;
  constexpr int kSlots = kProductThreads / kLanes;
  int lane = threadIdx.x % kLanes;
  int channel = chunk.begin(p) + lane * kVector, end = chunk.begin(p) + chunk.width;
  int offset_group = channel / p.offset_group_channels, first_group = chunk.begin(p) / p.offset_group_channels;
  int group_begin = offset_group * p.offset_group_channels, group_end = group_begin + p.offset_group_channels;
  bool exists = channel < end;
  int remaining = exists ? (min(end, group_end) - channel) / kVector : 0;
  bool is_first = exists && (lane == 0 || channel == group_begin);
  bool continues = group_begin<chunk.begin(p), goes_on = group_end> end;
  const T* image = p.input + tile.image * p.image_pixels * p.channels + channel;
#pragma unroll 1
  for (int pixel = threadIdx.x / kLanes; pixel < kRows; pixel += kSlots) {
    int at = exists ? (offset_group - first_group) * kRows + pixel : pixel;
    SampleGradient<Real> sum{0, 0, 0};
    const Sample<Real>& sample = memory.samples[at];
    if (exists && sample.row != sample.kOutside) {
      auto corners =
          CellVectors<T>::load(image, p.channels, int64_t(p.samples.width) * p.channels, Cell::of(p.samples, sample));
      sum = sample_gradient(corners, memory.gradient + pixel * Memory::kGradientStride + lane * kVector, sample);
    }
    sum.y = sum_lanes<kLanes>(sum.y, remaining);
    sum.x = sum_lanes<kLanes>(sum.x, remaining);
    sum.mask = sum_lanes<kLanes>(sum.mask, remaining);
    if (!is_first) continue;
    Real* carry = memory.carry + pixel;
    if (continues) {
      const Real* carried = carry + (step.chunk % 2 ? 0 : 3 * kRows);
      sum.y += carried[0], sum.x += carried[kRows], sum.mask += carried[2 * kRows];
    }
    if (goes_on) {
      Real* next = carry + (step.chunk % 2 ? 3 * kRows : 0);
      next[0] = sum.y, next[kRows] = sum.x, next[2 * kRows] = sum.mask;
    } else if (pixel < tile.count) {
      int64_t plane = sample_plane(p.samples, tile.image, offset_group, step.tap), at = tile.first + pixel;
      if (p.grad_offset != nullptr) {
        store_as_of<T>(sum.y, p.grad_offset, p.samples.offset_is_float, 2 * plane + at);
        store_as_of<T>(sum.x, p.grad_offset, p.samples.offset_is_float, 2 * plane + p.samples.out_pixels + at);
      }
      if (p.grad_mask != nullptr) store_as_of<T>(sum.mask, p.grad_mask, p.samples.mask_is_float, plane + at);
    }
  }
}

// What is still to be added to two pixels, one below the other, of the input's gradient.
template <class Real, int kWidth>
struct PendingColumn {
  int row, column;  // of the upper pixel
  Real upper[kWidth], lower[kWidth];
};

template <class Sum, class Real, int kWidth>
__device__ __forceinline__ void add_pixel(const Sum& sum, int64_t at, const Real (&values)[kWidth]) {
  bool any = false;
#pragma unroll
  for (int c = 0; c < kWidth; ++c) any |= !(values[c] == 0);
  if (any) sum.add(at, values);
}

// Step 3 of the head comment.
template <class T, class Product, class Sum>
__device__ __forceinline__ void scatter(const InputSide<T>& p, const Sum& sum, const InputMemory<T, Product>& memory,
                                        const PixelTile& tile, const Chunk& chunk) {
  using Real = device_acc_t<T>;
  constexpr int kRows = TileShape<T>::kRows, kWidth = Sum::kWidth, kLanes = TileShape<T>::kColumns / kWidth;
  constexpr int kRun = kRows * kLanes / kProductThreads;
  int channel = threadIdx.x % kLanes * kWidth, first_pixel = threadIdx.x / kLanes * kRun;
  if (channel >= chunk.width) return;
  int place = chunk.begin(p) + channel;
  const Sample<Real>* samples =
      memory.samples + (place / p.offset_group_channels - chunk.begin(p) / p.offset_group_channels) * kRows;
  const Real* gradient = memory.gradient + channel;
  const int64_t image = tile.image * p.image_pixels;

  auto flush = [&](const PendingColumn<Real, kWidth>& pending) {
    if (pending.column < 0 || pending.column >= p.samples.width) return;
    int64_t at = (image + int64_t(pending.row) * p.samples.width + pending.column) * p.channels + place;
    if (pending.row >= 0) add_pixel(sum, at, pending.upper);
    if (pending.row + 1 < p.samples.height) add_pixel(sum, at + int64_t(p.samples.width) * p.channels, pending.lower);
  };
  PendingColumn<Real, kWidth> pending{0, -2, {}, {}};
#pragma unroll 1
  for (int pixel = first_pixel; pixel < first_pixel + kRun; ++pixel) {
    const Sample<Real>& sample = samples[pixel];
    int row = sample.row, column = sample.column;
    if (row == sample.kOutside) continue;
    Real x = sample.fraction_x, upper = sample.mask * (1 - sample.fraction_y), lower = sample.mask * sample.fraction_y;
    PendingColumn<Real, kWidth> left{row, column, {}, {}};
    if (pending.row == row && pending.column == column) {
      left = pending;
    } else {
      flush(pending);
    }
    pending.row = row, pending.column = column + 1;
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      Real g = gradient[pixel * InputMemory<T, Product>::kGradientStride + c];
      left.upper[c] += upper * (1 - x) * g;
      left.lower[c] += lower * (1 - x) * g;
      pending.upper[c] = upper * x * g;
      pending.lower[c] = lower * x * g;
    }
    flush(left);
  }
  flush(pending);
}

template <class T, class Product>
__device__ __forceinline__ void run_input_tile(const InputSide<T>& p) {
  using Real = device_acc_t<T>;
  using Shape = TileShape<T>;
  auto memory = InputMemory<T, Product>::get();
  int tile_index = blockIdx.x / p.tap_parts, part = blockIdx.x % p.tap_parts;
  int64_t first = int64_t(tile_index % p.tiles_per_image) * Shape::kRows;
  const auto tile = PixelTile::at(p.samples, tile_index / p.tiles_per_image, first, Shape::kRows);
  const int depths = ceil_div(p.group_outputs, Shape::kDepth);
  Step step{int(int64_t(part) * p.samples.taps / p.tap_parts), 0, 0};
  const int end_tap = int(int64_t(part + 1) * p.samples.taps / p.tap_parts);
  FixedSum<Real> fixed_sum = p.fixed_sum;
  if (p.fixed) fixed_sum.prepare();

  Product product;
  load_operands(p, memory, tile, step, false);
  while (step.tap < end_tap) {
    Chunk chunk = Chunk::at(p, step.chunk);
    cp_async_wait<0>();
    __syncthreads();  // the operands are there, and everyone is done with the samples and gradients before
    if (step.depth == 0) {
      product.clear();
      int first_group = chunk.begin(p) / p.offset_group_channels;
      int last_group = (chunk.begin(p) + chunk.width - 1) / p.offset_group_channels;
      write_samples<T, Real, Shape::kRows, kProductThreads>(p.samples, tile, step.tap, first_group,
                                                            last_group - first_group + 1, memory.samples);
    }
    int depth = min(p.group_outputs - step.depth * Shape::kDepth, Shape::kDepth);
    product.multiply(memory.grad_output, memory.weight, round_up(depth, Product::kStep));
    bool complete = step.depth == depths - 1;
    if (complete) product.store(memory.gradient, memory.kGradientStride, Shape::kRows, Shape::kColumns);
    __syncthreads();  // everyone is done with the operands; samples and gradients are there
    Step next = step;
    next.advance(p, depths);
    if (next.tap < end_tap) {
      load_operands(p, memory, tile, next, depths == 1 && Chunk::at(p, next.chunk).group == chunk.group);
    }
    if (complete) {
      if (p.grad_offset != nullptr || p.grad_mask != nullptr) {
        offset_gradients(p, memory, tile, step, chunk);
      }
      if (p.grad_input) {
        if (p.fixed) {
          scatter(p, fixed_sum, memory, tile, chunk);
        } else {
          scatter(p, p.float_sum, memory, tile, chunk);
        }
      }
    }
    step = next;
  }
}

template <class T, class Product>
__global__ void __launch_bounds__(kProductThreads, sizeof(T) == 8 ? 2 : 3) input_gradients(InputSide<T> p) {
  if constexpr (Product::kRunsHere) {
    run_input_tile<T, Product>(p);
  } else {
    __trap();  // the host chose another product for this device
  }
}

// The grid's blocks: with few tiles, the taps of a tile are spread over several blocks.
template <class T, class Product>
void launch_input_gradients(InputSide<T> side, const Params& p, cudaStream_t stream) {
  int64_t tiles = p.batch * side.tiles_per_image, wanted = ceil_div<int64_t>(4 * device_multiprocessors(), tiles);
  side.tap_parts = int(wanted < p.taps() ? wanted : p.taps());
  Grid grid{dim3(unsigned(tiles * side.tap_parts)), dim3(kProductThreads),
            InputMemory<T, Product>::bytes(side.offset_groups_per_chunk)};
  launch(input_gradients<T, Product>, grid, stream, side);
}

}  // namespace hdrops::deform_conv2d
