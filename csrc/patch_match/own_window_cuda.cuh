// Search around given centres: neighbouring sites see the key at unequal displacements, so that each candidate's patch
// is multiplied by itself.
//
// A site has a power of two of lanes, up to a warp. They take the window's candidates in turn, row by row: neighbouring
// lanes read neighbouring pixels of the key and the same pixel of the query. Shuffles choose the best.
#pragma once
#include "patch_match/features_cuda.cuh"

namespace hdrops::patch_match {

constexpr int kSearchThreads = 128;

template <class T>
__global__ void __launch_bounds__(kSearchThreads, 4)
    search_around_centers(FeatureMap<T> query, FeatureMap<T> key, const device_acc_t<T>* key_scale,
                          const int64_t* centers, MatchTarget<T> target, int reach, int candidates, int lanes,
                          int64_t sites) {
  using Real = device_acc_t<T>;
  const int64_t site = (int64_t(blockIdx.x) * kSearchThreads + threadIdx.x) / lanes;
  const bool exists = site < sites;
  const int64_t query_pixels = int64_t(query.height) * query.width, key_pixels = int64_t(key.height) * key.width;
  const int64_t image = exists ? site / query_pixels : 0, at = exists ? site % query_pixels : 0;
  int64_t center = exists ? centers[site] : 0;
  center = center < 0 ? 0 : center >= key_pixels ? key_pixels - 1 : center;
  const int center_y = int(center / key.width), center_x = int(center % key.width);
  Best<Real> best;
  for (int place = int(threadIdx.x) % lanes; exists && place < candidates; place += lanes) {
    const int y = center_y + place / target.window_x - target.radius_y;
    const int x = center_x + place % target.window_x - target.radius_x;
    if (!key.contains(y, x)) continue;
    const Real product = patch_product(query, key, image, int(at / query.width), int(at % query.width), y, x, reach);
    best.offer(product * scale_at(key_scale, image * key_pixels + int64_t(y) * key.width + x), place);
  }
  for (int lane = lanes / 2; lane > 0; lane /= 2) {
    const Real score = __shfl_xor_sync(0xffffffffu, best.score, lane);
    const int place = __shfl_xor_sync(0xffffffffu, best.place, lane);
    best.offer(score, place);
  }
  if (exists && threadIdx.x % lanes == 0) target.write(site, center_y, center_x, best);
}

template <class T>
void launch_search_around_centers(const MatchParams& p, const device_acc_t<T>* key_scale,
                                  const device_acc_t<T>* query_scale, cudaStream_t stream) {
  const int64_t candidates = p.window_y() * p.window_x(), sites = p.batch * p.sites();
  int lanes = 1;
  while (lanes < 32 && lanes < candidates) lanes *= 2;
  const Grid grid{dim3(unsigned(ceil_div<int64_t>(sites * lanes, kSearchThreads))), dim3(kSearchThreads)};
  launch(search_around_centers<T>, grid, stream, FeatureMap<T>::of(p.query, p.channels),
         FeatureMap<T>::of(p.key, p.channels), key_scale, p.centers, MatchTarget<T>::of(p, query_scale), int(p.reach()),
         int(candidates), lanes, sites);
}

}  // namespace hdrops::patch_match
