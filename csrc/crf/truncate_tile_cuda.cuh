// The truncation process on CUDA, tile by tile: a block loads its tile with a halo and takes it through every stage
// (truncate_stages_cuda.cuh) in shared memory, so that an image is read once and written once. Each stage needs a
// radius less of the halo than the one before: 2 radii in the forward pass, 4 in the backward.
//
// Reflected borders are made when the tile is loaded: an image that is continued by reflection without end has means,
// slopes and shifts that are continued in the same way. A box's transpose counts how often a box has the pixel
// instead (Ends::times_in_box).
//
// A planar image (step 1) is cut into tiles of pixels; of one whose channels lie side by side a tile has a few
// channels, and neighbours along a row are that many elements apart.
//
// Shared memory: H, first, second [rows, pitch]; slope, shift or inverse and offset, a radius of rows less at either
// end; in the backward pass the tile's direct gradient.
#pragma once
#include "crf/kernels_cuda.h"
#include "crf/shared_bytes_cuda.h"
#include "crf/truncate_stages_cuda.cuh"

namespace hdrops {

// Of a block: as many as keep a multiprocessor busy beside the shared memory that a tile of 32 x 32 takes.
template <bool kBackward>
constexpr int kTileThreads = kBackward ? 512 : 256;

// How an image is cut.
struct TruncateTiling {
  int width, height, channels;  // of a tile; width 0: there is none
  int radius, halo;
  int64_t columns, rows, groups;  // tiles of a plane

  HDROPS_HD int pitch() const { return (width + 2 * halo) * channels; }
  HDROPS_HD int all_rows() const { return height + 2 * halo; }
};

template <class A>
struct InShared {
  const A* data;
  __device__ __forceinline__ A operator()(int i) const { return data[i]; }
};

template <bool kBackward, class A>
size_t tile_bytes(const TruncateTiling& t) {
  const size_t all = size_t(t.all_rows()) * t.pitch(), inner = size_t(t.all_rows() - 2 * t.radius) * t.pitch();
  const size_t elements = 3 * all + (kBackward ? 3 * inner + size_t(t.width) * t.height * t.channels : 2 * inner);
  return elements * sizeof(A);
}

template <int kRadius, bool kPlanar, bool kBackward, class T>
struct TruncateTile {
  using A = device_acc_t<T>;
  using Stages = TruncateStages<kRadius, kBackward, A, InShared<A>>;

  const TruncateParams& p;
  const TruncateTiling& tiling;
  Stages stages;
  A* image;
  A* direct;
  int64_t plane, top, left;  // where the plane begins; the tile's first row and pixel
  int64_t first_channel;

  __device__ __forceinline__ int channels() const { return kPlanar ? 1 : tiling.channels; }
  __device__ __forceinline__ int radius() const { return kRadius > 0 ? kRadius : tiling.radius; }
  __device__ __forceinline__ int halo() const { return (kBackward ? 4 : 2) * radius(); }

  __device__ __forceinline__ TruncateTile(const TruncateParams& params, const TruncateTiling& cut)
      : p(params), tiling(cut), stages{}, image(shared_memory<A>()) {
    int64_t block = blockIdx.x;
    first_channel = block % cut.groups * cut.channels, block /= cut.groups;
    left = block % cut.columns * cut.width, block /= cut.columns;
    top = block % cut.rows * cut.height, block /= cut.rows;
    plane = block * p.height * p.width * p.step;
    const int all = cut.all_rows() * cut.pitch(), margin = radius() * cut.pitch(), inner = all - 2 * margin;
    stages.image = {image};
    stages.first = image + all;
    stages.second = stages.first + all;
    stages.slope = stages.second + all - margin;
    stages.shift = stages.inverse = stages.slope + inner;
    stages.offset = stages.inverse + inner;
    direct = stages.offset + inner + margin;
    stages.given_radius = tiling.radius;
    stages.eps = filter_eps<A>(p.eps);
  }

  // Calls action(row, column) of the tile with `more_rows` and `more_pixels` around it, row and column counted with the
  // whole halo, all threads of the block together. Columns are elements, not pixels.
  template <class Action>
  __device__ __forceinline__ void for_region(int more_rows, int more_pixels, const Action& action) const {
    const int first_row = halo() - more_rows, rows = tiling.height + 2 * more_rows;
    const int first_column = (halo() - more_pixels) * channels();
    const int columns = (tiling.width + 2 * more_pixels) * channels();
    const int row_step = int(blockDim.x) / columns, column_step = int(blockDim.x) % columns;
    int row = int(threadIdx.x) / columns, column = int(threadIdx.x) % columns;
    while (row < rows) {
      action(first_row + row, first_column + column);
      row += row_step, column += column_step;
      if (column >= columns) column -= columns, ++row;
    }
    __syncthreads();
  }

  __device__ __forceinline__ int64_t image_row(int row) const { return top + row - halo(); }
  __device__ __forceinline__ int64_t image_pixel(int column) const { return left + column / channels() - halo(); }
  __device__ __forceinline__ int64_t image_channel(int column) const {
    return kPlanar ? 0 : first_channel + column % channels();
  }

  // Where an element of the tile is in memory; a negative number if it is outside of the image.
  __device__ __forceinline__ int64_t place(int row, int column) const {
    const int64_t y = image_row(row), x = image_pixel(column), c = image_channel(column);
    if (y < 0 || y >= p.height || x < 0 || x >= p.width || c >= p.step) return -1;
    return plane + (y * p.width + x) * p.step + c;
  }

  // What is outside is reflected at one border after the other.
  __device__ __forceinline__ static int64_t reflect(int64_t at, int64_t size) {
    if (at >= 0 && at < size) return at;
    const int64_t period = 2 * (size - 1), in_period = (at % period + period) % period;
    return in_period < size ? in_period : period - in_period;
  }

  __device__ __forceinline__ void load(const T* input) const {
    for_region(halo(), halo(), [&](int row, int column) {
      const int64_t y = reflect(image_row(row), p.height), x = reflect(image_pixel(column), p.width);
      const int64_t c = image_channel(column), channel = c < p.step ? c : p.step - 1;
      image[row * tiling.pitch() + column] = load_as(input[plane + (y * p.width + x) * p.step + channel]);
    });
  }

  using TileLine = Line<int, false>;

  __device__ __forceinline__ TileLine along_row(int row, int column) const {
    const Ends ends = kBackward ? Ends::of(image_pixel(column), p.width) : Ends{};
    return {row * tiling.pitch() + column, channels(), ends};
  }
  __device__ __forceinline__ TileLine along_column(int row, int column) const {
    const Ends ends = kBackward ? Ends::of(image_row(row), p.height) : Ends{};
    return {row * tiling.pitch() + column, tiling.pitch(), ends};
  }

  // What both passes begin with, as far as the sums over the rows of a and b.
  __device__ __forceinline__ void filter() const {
    const int r = radius(), all = halo();
    for_region(all, all - r, [&](int row, int column) { stages.row_moments(along_row(row, column)); });
    for_region(all - r, all - r, [&](int row, int column) { stages.guide(along_column(row, column)); });
    for_region(all - r, all - 2 * r, [&](int row, int column) { stages.guide_sums(along_row(row, column)); });
  }

  __device__ __forceinline__ void forward(const T* input, T* output) const {
    load(input);
    filter();
    for_region(0, 0, [&](int row, int column) {
      const int64_t to = place(row, column);
      if (to >= 0) output[to] = store_as<T>(stages.base(along_column(row, column)));
    });
  }

  __device__ __forceinline__ A& direct_at(int row, int column) const {
    return direct[(row - halo()) * (tiling.width * channels()) + column - halo() * channels()];
  }
  __device__ __forceinline__ bool in_tile(int row, int column) const {
    const int x = column - halo() * channels();
    return row >= halo() && row < halo() + tiling.height && x >= 0 && x < tiling.width * channels();
  }

  __device__ __forceinline__ void backward(const T* input, const T* grad_output, T* grad_input) const {
    const int r = radius();
    load(input);
    filter();
    for_region(2 * r, 2 * r, [&](int row, int column) {
      const int64_t from = place(row, column);
      if (from < 0) return;
      const A past_boxes = stages.base_gradient(along_column(row, column), load_as(grad_output[from]));
      if (in_tile(row, column)) direct_at(row, column) = past_boxes;
    });
    for_region(2 * r, r, [&](int row, int column) { stages.base_gradient_sums(along_row(row, column)); });
    for_region(r, r, [&](int row, int column) { stages.moment_gradients(along_column(row, column)); });
    for_region(r, 0, [&](int row, int column) { stages.moment_gradient_sums(along_row(row, column)); });
    for_region(0, 0, [&](int row, int column) {
      const int64_t to = place(row, column);
      if (to < 0) return;
      grad_input[to] = store_as<T>(direct_at(row, column) + stages.image_gradient(along_column(row, column)));
    });
  }
};

// grad_output null and output the result, or output the input's gradient.
template <int kRadius, bool kPlanar, bool kBackward, class T>
__global__ __launch_bounds__(kTileThreads<kBackward>) void truncate_tile_kernel(TruncateParams p, TruncateTiling tiling,
                                                                                const T* input, const T* grad_output,
                                                                                T* output) {
  const TruncateTile<kRadius, kPlanar, kBackward, T> tile(p, tiling);
  if constexpr (kBackward) {
    tile.backward(input, grad_output, output);
  } else {
    tile.forward(input, output);
  }
}

// The tile of an image: the largest of which two blocks fit a multiprocessor, else one. Above kLargestHalo most of a
// block's work would be its halo; a tiling of width 0 then.
template <bool kBackward, class T>
TruncateTiling truncate_tiling(const TruncateParams& p) {
  constexpr int64_t kLargestHalo = 16, kReservedBytes = 1024;  // of every block
  constexpr int kSizes[][2] = {{32, 32}, {32, 16}, {16, 16}, {16, 8}, {8, 8}};
  TruncateTiling tiling{};
  if (p.radius * (kBackward ? 4 : 2) > kLargestHalo) return tiling;
  tiling.radius = int(p.radius), tiling.halo = tiling.radius * (kBackward ? 4 : 2);
  const int64_t memory = shared_bytes_per_block();
  for (int blocks = 2; blocks > 0; --blocks) {
    for (const int channels : {p.step < 4 ? int(p.step) : 4, 1}) {
      for (const auto& size : kSizes) {
        tiling.width = channels > 1 && size[0] > 16 ? 16 : size[0], tiling.height = size[1];
        tiling.channels = channels;
        if ((int64_t(tile_bytes<kBackward, device_acc_t<T>>(tiling)) + kReservedBytes) * blocks >
            memory + kReservedBytes) {
          continue;
        }
        tiling.columns = ceil_div<int64_t>(p.width, tiling.width);
        tiling.rows = ceil_div<int64_t>(p.height, tiling.height);
        tiling.groups = ceil_div<int64_t>(p.step, channels);
        return tiling;
      }
    }
  }
  tiling.width = 0;
  return tiling;
}

template <bool kBackward, class T>
void launch_truncate_tiles(const TruncateParams& p, const TruncateTiling& t, const T* input, const T* grad_output,
                           T* output, cudaStream_t stream) {
  constexpr int kUsual = 2;  // radius
  const int64_t blocks = t.rows * t.columns * t.groups, plane = p.height * p.row();
  const int64_t most = blocks < INT32_MAX ? INT32_MAX / blocks : 1;  // planes of one grid
  for (int64_t done = 0; done < p.planes; done += most) {
    const int64_t planes = p.planes - done < most ? p.planes - done : most;
    const Grid grid{dim3(unsigned(planes * blocks)), dim3(kTileThreads<kBackward>),
                    tile_bytes<kBackward, device_acc_t<T>>(t)};
    const T* grad = kBackward ? grad_output + done * plane : nullptr;
    const auto run = [&](auto kernel) {
      launch(kernel, grid, stream, p, t, input + done * plane, grad, output + done * plane);
    };
    if (p.step > 1) {
      p.radius == kUsual ? run(truncate_tile_kernel<kUsual, false, kBackward, T>)
                         : run(truncate_tile_kernel<0, false, kBackward, T>);
    } else {
      p.radius == kUsual ? run(truncate_tile_kernel<kUsual, true, kBackward, T>)
                         : run(truncate_tile_kernel<0, true, kBackward, T>);
    }
  }
}

}  // namespace hdrops
