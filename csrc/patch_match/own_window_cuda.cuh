// Search around given centres in the tiles of several displacements (tile_shifts_cuda.cuh): neighbouring sites see the
// key at unequal displacements, so that each candidate's patch is multiplied by itself.
//
// A site has a power of two of lanes, up to a warp. They take the window's candidates in turn, row by row: neighbouring
// lanes read neighbouring pixels of the key and the same pixel of the query. Shuffles choose the best.
#pragma once
#include "patch_match/tiled_search_cuda.cuh"

namespace hdrops::patch_match {

constexpr int kSearchThreads = 128;

template <class T>
__global__ void __launch_bounds__(kSearchThreads, 4)
    search_around_centers(FeatureMap<T> query, FeatureMap<T> key, const device_acc_t<T>* key_scale, KeyCenters centers,
                          TileMatches<T> matches, int reach, int candidates, int lanes) {
  using Real = device_acc_t<T>;
  const MatchTarget<T>& target = matches.target;
  const int64_t site = (int64_t(blockIdx.x) * kSearchThreads + threadIdx.x) / lanes;
  bool exists = site < matches.sites;
  const int64_t query_pixels = int64_t(query.height) * query.width;
  const int64_t image = exists ? site / query_pixels : 0, at = exists ? site % query_pixels : 0;
  const int query_y = int(at / query.width), query_x = int(at % query.width);
  exists = exists && matches.shift_at(image, query_y, query_x).y == TileShift::kMixed;
  const int64_t center = exists ? centers.at(site) : 0;
  const int center_y = int(center / key.width), center_x = int(center % key.width);
  Best<Real> best;
  for (int place = int(threadIdx.x) % lanes; exists && place < candidates; place += lanes) {
    const int y = center_y + place / target.window_x - target.radius_y;
    const int x = center_x + place % target.window_x - target.radius_x;
    if (!key.contains(y, x)) continue;
    const Real product = patch_product(query, key, image, query_y, query_x, y, x, reach);
    best.offer(product * scale_at(key_scale, image * centers.pixels + int64_t(y) * key.width + x), place);
  }
  for (int lane = lanes / 2; lane > 0; lane /= 2) {
    const Real score = __shfl_xor_sync(0xffffffffu, best.score, lane);
    const int place = __shfl_xor_sync(0xffffffffu, best.place, lane);
    best.offer(score, place);
  }
  if (exists && threadIdx.x % lanes == 0) target.write(site, center_y, center_x, best);
}

template <class T>
void launch_search_around_centers(const MatchParams& p, const device_acc_t<T>* key_scale, const TileMatches<T>& matches,
                                  cudaStream_t stream) {
  const int64_t candidates = p.window_y() * p.window_x();
  int lanes = 1;
  while (lanes < 32 && lanes < candidates) lanes *= 2;
  const Grid grid{dim3(unsigned(ceil_div<int64_t>(matches.sites * lanes, kSearchThreads))), dim3(kSearchThreads)};
  launch(search_around_centers<T>, grid, stream, FeatureMap<T>::of(p.query, p.channels),
         FeatureMap<T>::of(p.key, p.channels), key_scale, KeyCenters::of(p), matches, int(p.reach()), int(candidates),
         lanes);
}

}  // namespace hdrops::patch_match
