// What the searches that share products between the sites of a tile have in common (shared_window_cuda.cuh,
// matrix_window_cuda.cuh): how the query is cut into tiles, which displacements of the window a tile's sites can see,
// and how several blocks share a tile.
//
// A block walks a tile's window in passes, each over some rows and columns of displacements. Where there are fewer
// tiles than the GPU can hold blocks, a tile's passes are split between several, and a small kernel chooses between
// their matches.
#pragma once
#include "common/pieces.h"
#include "patch_match/features_cuda.cuh"

namespace hdrops::patch_match {

// Numbers first, first + 1, .., last.
struct Range {
  int first, last;
  __device__ __forceinline__ int count() const { return last - first + 1; }
  // In steps of `step`.
  __device__ __forceinline__ int passes(int step) const { return (last - first) / step + 1; }
};

// The displacements of a window of `radius` with which sites from `first` to `last` meet the key's `size`.
__device__ __forceinline__ Range visible(int radius, int first, int last, int size) {
  last = min(last, size - 1);
  return {max(-radius, -last), min(radius, size - 1 - first)};
}

// Tiles of across x down sites, and the blocks that share each.
struct TileGrid {
  int across, down, tiles_x, tiles_y, splits;

  // `passes`: of a window that lies whole on the key; `at_once`: blocks that a multiprocessor holds.
  static TileGrid of(const MatchParams& p, int64_t across, int64_t down, int64_t passes, int at_once) {
    const int64_t tiles_x = ceil_div<int64_t>(p.query.width, across), tiles_y = ceil_div(p.query.height, down);
    // Enough blocks for some six rounds, so that the last, partly empty one costs little.
    int64_t wanted = ceil_div<int64_t>(6 * at_once * device_multiprocessors(), p.batch * tiles_x * tiles_y);
    if (wanted > passes) wanted = passes;
    return {int(across), int(down), int(tiles_x), int(tiles_y), int(ceil_div(passes, ceil_div(passes, wanted)))};
  }
  int64_t tiles(const MatchParams& p) const { return p.batch * tiles_x * tiles_y; }
};

// What a block has: the tile whose first site is (top, left), and of its passes those of one split.
struct BlockTile {
  int image, top, left, split;

  __device__ __forceinline__ static BlockTile mine(const TileGrid& grid) {
    const int block = computed_again(int(blockIdx.x)), tile = block / grid.splits;
    return {tile / grid.tiles_x / grid.tiles_y, tile / grid.tiles_x % grid.tiles_y * grid.down,
            tile % grid.tiles_x * grid.across, block % grid.splits};
  }
  // The passes of this split.
  __device__ __forceinline__ Range part(const TileGrid& grid, int passes) const {
    return {int(int64_t(passes) * split / grid.splits), int(int64_t(passes) * (split + 1) / grid.splits) - 1};
  }
};

// Where the blocks write what they found.
template <class T>
struct TileMatches {
  using Real = device_acc_t<T>;
  TileGrid grid;
  MatchTarget<T> target;
  int height, width;  // of the query
  int64_t sites;      // of all images
  // Of each split, [splits][N][H][W]; null: the one split writes to the target.
  Real* part_score;
  int* part_place;

  static TileMatches take(const MatchParams& p, const TileGrid& grid, const Real* query_scale, Pieces& pieces) {
    TileMatches matches{};
    matches.grid = grid;
    matches.target = MatchTarget<T>::of(p, query_scale);
    matches.height = int(p.query.height), matches.width = int(p.query.width);
    matches.sites = p.batch * p.sites();
    if (grid.splits == 1) return matches;
    matches.part_score = pieces.take<Real>(grid.splits * matches.sites);
    matches.part_place = pieces.take<int>(grid.splits * matches.sites);
    return matches;
  }
  // The best of a split's candidates for the site at (y, x).
  __device__ __forceinline__ void write(const BlockTile& tile, int y, int x, const Best<Real>& best) const {
    const int64_t site = (int64_t(tile.image) * height + y) * width + x;
    if (grid.splits == 1) return target.write(site, y, x, best);
    part_score[tile.split * sites + site] = best.score;
    part_place[tile.split * sites + site] = best.place;
  }
};

constexpr int kMergeThreads = 256;

// The best match of the splits'.
template <class T>
__global__ void __launch_bounds__(kMergeThreads) merge_splits(TileMatches<T> m) {
  const int64_t site = int64_t(blockIdx.x) * kMergeThreads + threadIdx.x;
  if (site >= m.sites) return;
  Best<device_acc_t<T>> best;
  for (int split = 0; split < m.grid.splits; ++split) {
    best.offer(m.part_score[split * m.sites + site], m.part_place[split * m.sites + site]);
  }
  const int64_t at = site % (int64_t(m.height) * m.width);
  m.target.write(site, int(at / m.width), int(at % m.width), best);
}

template <class T>
void launch_merge_splits(const TileMatches<T>& matches, cudaStream_t stream) {
  if (matches.grid.splits == 1) return;
  const Grid grid{dim3(unsigned(ceil_div<int64_t>(matches.sites, kMergeThreads))), dim3(kMergeThreads)};
  launch(merge_splits<T>, grid, stream, matches);
}

}  // namespace hdrops::patch_match
