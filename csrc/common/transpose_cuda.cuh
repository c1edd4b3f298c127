// Moves matrices between row-major and column-major order: planes of a tensor [N, C, H, W] to channels last and back.
#pragma once
#include "common/device.cuh"
#include "common/hd.h"

namespace hdrops {

// `matrices` times: target[column][row] = source[row][column] for rows x columns elements; the source's rows lie one
// after another, the target's `pitch` >= rows elements apart, filled with zeros. From is converted to To.
template <class From, class To>
struct Transposition {
  const From* source;
  To* target;
  int64_t matrices, rows, columns, pitch;
};

constexpr int kTransposeTile = 32, kTransposeThreads = 256;

// A block moves a tile of 32 rows and columns through 4 KB of shared memory (half of that for 16-bit sources, twice for
// double), whose rows are one element longer than the tile: reads and writes run along the lanes on both sides.
template <class From, class To>
__global__ void __launch_bounds__(kTransposeThreads) transpose_kernel(Transposition<From, To> t) {
  From* tile = shared_memory<From>();
  constexpr int kPitch = kTransposeTile + 1, kStep = kTransposeThreads / kTransposeTile;
  int64_t down = ceil_div<int64_t>(t.pitch, kTransposeTile), across = ceil_div<int64_t>(t.columns, kTransposeTile);
  int64_t block = blockIdx.x;
  int64_t first_column = block % across * kTransposeTile, first_row = block / across % down * kTransposeTile;
  int64_t matrix = block / across / down;
  int lane = int(threadIdx.x) % kTransposeTile, line = int(threadIdx.x) / kTransposeTile;

  const From* source = t.source + matrix * t.rows * t.columns;
#pragma unroll
  for (int i = line; i < kTransposeTile; i += kStep) {
    int64_t row = first_row + i, column = first_column + lane;
    bool exists = row < t.rows && column < t.columns;
    tile[i * kPitch + lane] = exists ? source[row * t.columns + column] : From{};
  }
  __syncthreads();
  To* target = t.target + matrix * t.columns * t.pitch;
#pragma unroll
  for (int i = line; i < kTransposeTile; i += kStep) {
    int64_t row = first_row + lane, column = first_column + i;
    if (row < t.pitch && column < t.columns) {
      target[column * t.pitch + row] = store_as<To>(load_as(tile[lane * kPitch + i]));
    }
  }
}

template <class From, class To>
void transpose(const Transposition<From, To>& t, cudaStream_t stream) {
  int64_t tiles = ceil_div<int64_t>(t.pitch, kTransposeTile) * ceil_div<int64_t>(t.columns, kTransposeTile);
  Grid grid{dim3(unsigned(t.matrices * tiles)), dim3(kTransposeThreads),
            kTransposeTile * (kTransposeTile + 1) * sizeof(From)};
  launch(transpose_kernel<From, To>, grid, stream, t);
}

}  // namespace hdrops
