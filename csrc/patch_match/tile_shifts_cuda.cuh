// Where given centres lie: for each tile of the query, the one displacement at which the windows of all its sites lie,
// or that there are several. The first are searched with shared products, like own positions (shared_window_cuda.cuh,
// matrix_window_cuda.cuh), the others site by site (own_window_cuda.cuh). It is the rule of the CPU's tiles (tiles.h).
#pragma once
#include "patch_match/tiled_search_cuda.cuh"

namespace hdrops::patch_match {

constexpr int kShiftThreads = 128;

// A block looks at a tile.
static __global__ void __launch_bounds__(kShiftThreads)
    find_shifts(TileGrid grid, KeyCenters centers, int height, int width, TileShift* shifts) {
  const int tile = int(blockIdx.x), top = tile / grid.tiles_x % grid.tiles_y * grid.down;
  const int left = tile % grid.tiles_x * grid.across, right = min(left + grid.across, width);
  const int64_t image = tile / grid.tiles_x / grid.tiles_y, first = centers.at((image * height + top) * width + left);
  const TileShift shift{int(first / centers.width) - top, int(first % centers.width) - left};
  // A run of consecutive indices must not pass the end of a row.
  bool same = int64_t(right) + shift.x <= centers.width;
  for (int i = int(threadIdx.x); i < grid.across * grid.down; i += kShiftThreads) {
    const int row = i / grid.across, column = i % grid.across;
    if (top + row >= height || left + column >= width) continue;
    const int64_t center = centers.at((image * height + top + row) * width + left + column);
    same = same && center == first + int64_t(row) * centers.width + column;
  }
  same = __syncthreads_and(same) != 0;
  if (threadIdx.x == 0) shifts[tile] = same ? shift : TileShift{TileShift::kMixed, 0};
}

inline void launch_find_shifts(const MatchParams& p, const TileGrid& grid, TileShift* shifts, cudaStream_t stream) {
  const Grid blocks{dim3(unsigned(grid.tiles(p))), dim3(kShiftThreads)};
  launch(find_shifts, blocks, stream, grid, KeyCenters::of(p), int(p.query.height), int(p.query.width), shifts);
}

}  // namespace hdrops::patch_match
