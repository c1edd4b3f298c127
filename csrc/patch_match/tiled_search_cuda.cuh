// What the searches that share products between the sites of a tile have in common (shared_window_cuda.cuh,
// matrix_window_cuda.cuh): how the query is cut into tiles, at which displacement their windows lie, which
// displacements of the window a tile's sites can see, and how several blocks share a tile.
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

// The displacements with which sites from `first` to `last` meet the key's `size`, of windows of `radius` around
// centres that lie `shift` from the sites, all in the key.
__device__ __forceinline__ Range visible(int radius, int first, int last, int shift, int size) {
  const int64_t low = int64_t(shift) - radius, high = int64_t(shift) + radius;
  return {low > -last ? int(low) : -last, high < size - 1 - first ? int(high) : size - 1 - first};
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

// Given centres, clamped to the key.
struct KeyCenters {
  const int64_t* places;
  int64_t pixels;  // of the key
  int width;

  static KeyCenters of(const MatchParams& p) { return {p.centers, p.key.height * p.key.width, int(p.key.width)}; }
  __device__ __forceinline__ int64_t at(int64_t site) const {
    const int64_t place = places[site];
    return place < 0 ? 0 : place >= pixels ? pixels - 1 : place;
  }
};

// The displacement from the sites of a tile to the centres of their windows, or that it is not one (y = kMixed).
struct TileShift {
  static constexpr int kMixed = INT32_MIN;
  int y, x;
};

// Where the blocks write what they found.
template <class T>
struct TileMatches {
  using Real = device_acc_t<T>;
  TileGrid grid;
  MatchTarget<T> target;
  int height, width;        // of the query
  int64_t sites;            // of all images
  const TileShift* shifts;  // of each tile; null: none, the windows lie around own positions
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
  __device__ __forceinline__ TileShift shift(int64_t tile) const {
    return shifts == nullptr ? TileShift{0, 0} : shifts[tile];
  }
  // Of the tile that the site at (y, x) is in.
  __device__ __forceinline__ TileShift shift_at(int64_t image, int y, int x) const {
    return shift((image * grid.tiles_y + y / grid.down) * grid.tiles_x + x / grid.across);
  }
};

// What a block has: the tile whose first site is (top, left), and of its passes those of one split. Displacements are
// those from sites to the key, the tile's shift included.
struct BlockTile {
  int64_t image;
  int top, left, split;
  TileShift shift;

  template <class T>
  __device__ __forceinline__ static BlockTile mine(const TileMatches<T>& m) {
    const int block = computed_again(int(blockIdx.x)), tile = block / m.grid.splits;
    return {tile / m.grid.tiles_x / m.grid.tiles_y, tile / m.grid.tiles_x % m.grid.tiles_y * m.grid.down,
            tile % m.grid.tiles_x * m.grid.across, block % m.grid.splits, m.shift(tile)};
  }
  __device__ __forceinline__ bool mixed() const { return shift.y == TileShift::kMixed; }
  // The displacements with which the tile's sites meet the key.
  template <class T>
  __device__ __forceinline__ Range rows(const TileMatches<T>& m, int key_height) const {
    return visible(m.target.radius_y, top, min(top + m.grid.down, m.height) - 1, shift.y, key_height);
  }
  template <class T>
  __device__ __forceinline__ Range columns(const TileMatches<T>& m, int key_width) const {
    return visible(m.target.radius_x, left, min(left + m.grid.across, m.width) - 1, shift.x, key_width);
  }
  // The place in the window of displacement (dy, dx) is this + dy * window_x + dx, as unsigned numbers.
  template <class T>
  __device__ __forceinline__ unsigned first_place(const MatchTarget<T>& target) const {
    const unsigned row = unsigned(target.radius_y) - unsigned(shift.y);
    return row * unsigned(target.window_x) + unsigned(target.radius_x) - unsigned(shift.x);
  }
  // The passes of this split.
  __device__ __forceinline__ Range part(const TileGrid& grid, int passes) const {
    return {int(int64_t(passes) * split / grid.splits), int(int64_t(passes) * (split + 1) / grid.splits) - 1};
  }
  // The best of the split's candidates for the site at (y, x).
  template <class T>
  __device__ __forceinline__ void write(const TileMatches<T>& m, int y, int x,
                                        const Best<device_acc_t<T>>& best) const {
    const int64_t site = (image * m.height + y) * m.width + x;
    if (m.grid.splits == 1) return m.target.write(site, y + shift.y, x + shift.x, best);
    m.part_score[split * m.sites + site] = best.score;
    m.part_place[split * m.sites + site] = best.place;
  }
};

constexpr int kMergeThreads = 256;

// The best match of the splits'.
template <class T>
__global__ void __launch_bounds__(kMergeThreads) merge_splits(TileMatches<T> m) {
  const int64_t site = int64_t(blockIdx.x) * kMergeThreads + threadIdx.x;
  if (site >= m.sites) return;
  const int64_t pixels = int64_t(m.height) * m.width;
  const int y = int(site % pixels / m.width), x = int(site % pixels % m.width);
  const TileShift shift = m.shift_at(site / pixels, y, x);
  if (shift.y == TileShift::kMixed) return;
  Best<device_acc_t<T>> best;
  for (int split = 0; split < m.grid.splits; ++split) {
    best.offer(m.part_score[split * m.sites + site], m.part_place[split * m.sites + site]);
  }
  m.target.write(site, y + shift.y, x + shift.x, best);
}

template <class T>
void launch_merge_splits(const TileMatches<T>& matches, cudaStream_t stream) {
  if (matches.grid.splits == 1) return;
  const Grid grid{dim3(unsigned(ceil_div<int64_t>(matches.sites, kMergeThreads))), dim3(kMergeThreads)};
  launch(merge_splits<T>, grid, stream, matches);
}

}  // namespace hdrops::patch_match
