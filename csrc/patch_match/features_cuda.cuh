// Feature maps as the GPU's patch matching reads them, in place: NCHW or channels last; the norms of their patches; the
// inner product of two patches; and the order of candidates.
#pragma once
#include <cmath>

#include "common/device.cuh"
#include "patch_match/params.h"

namespace hdrops::patch_match {

// Channels that are read together.
constexpr int kChannels = 4;

template <class T>
struct FeatureMap {
  using Real = device_acc_t<T>;

  const T* data;
  int channels, height, width;
  int64_t pixel_stride, channel_stride, image_stride;
  bool vectors;  // kChannels of a pixel lie together and aligned

  static FeatureMap of(const Features& f, int64_t channels) {
    FeatureMap map{};
    map.data = static_cast<const T*>(f.data);
    map.channels = int(channels), map.height = int(f.height), map.width = int(f.width);
    map.pixel_stride = f.channels_last ? channels : 1;
    map.channel_stride = f.channels_last ? 1 : f.height * f.width;
    map.image_stride = channels * f.height * f.width;
    map.vectors = f.channels_last && channels % kChannels == 0 && reinterpret_cast<uintptr_t>(f.data) % 16 == 0;
    return map;
  }

  __device__ __forceinline__ bool contains(int y, int x) const { return y >= 0 && y < height && x >= 0 && x < width; }
  // A pixel's first channel.
  __device__ __forceinline__ const T* pixel(int64_t image, int y, int x) const {
    return data + image * image_stride + (int64_t(y) * width + x) * pixel_stride;
  }
  // Channels `first` to first + 3 of a pixel, where they lie together.
  __device__ __forceinline__ void load_vectors(const T* from, int first, Real (&to)[kChannels]) const {
    constexpr int kWidth = sizeof(T) == 8 ? 2 : 4;
#pragma unroll
    for (int i = 0; i < kChannels; i += kWidth) {
      const auto loaded = load_global(reinterpret_cast<const Vector<T, kWidth>*>(from + first + i));
#pragma unroll
      for (int k = 0; k < kWidth; ++k) to[i + k] = load_as(loaded.value[k]);
    }
  }
  // The same in any layout; zero beyond the last channel.
  __device__ __forceinline__ void load(const T* from, int first, Real (&to)[kChannels]) const {
    if (vectors) return load_vectors(from, first, to);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      to[i] = first + i < channels ? load_as(from[(first + i) * channel_stride]) : Real(0);
    }
  }
};

// ---- norms

constexpr int kNormWidth = 32, kNormHeight = 8, kNormThreads = kNormWidth * kNormHeight;

// scale [N, H, W] = 1 / max(norm of the patch, kSmallestNorm). A block has 32 x 8 sites: the energy of each of their
// pixels and of the halo's goes to shared memory, where the boxes are added up.
template <class T>
__global__ void __launch_bounds__(kNormThreads)
    inverse_norms(FeatureMap<T> map, int reach, int tiles_x, int tiles_y, device_acc_t<T>* scale) {
  using Real = device_acc_t<T>;
  Real* energy = shared_memory<Real>();
  const int64_t tile = blockIdx.x, image = tile / tiles_x / tiles_y;
  const int left = int(tile % tiles_x) * kNormWidth, top = int(tile / tiles_x % tiles_y) * kNormHeight;
  const int pitch = kNormWidth + 2 * reach, count = pitch * (kNormHeight + 2 * reach);
  for (int i = int(threadIdx.x); i < count; i += kNormThreads) {
    const int y = top - reach + i / pitch, x = left - reach + i % pitch;
    Real sum = 0;
    if (map.contains(y, x)) {
      const T* from = map.pixel(image, y, x);
      for (int c = 0; c < map.channels; c += kChannels) {
        Real value[kChannels];
        map.load(from, c, value);
#pragma unroll
        for (int k = 0; k < kChannels; ++k) sum += value[k] * value[k];
      }
    }
    energy[i] = sum;
  }
  __syncthreads();
  const int column = int(threadIdx.x) % kNormWidth, row = int(threadIdx.x) / kNormWidth;
  if (top + row >= map.height || left + column >= map.width) return;
  Real sum = 0;
  for (int dy = 0; dy <= 2 * reach; ++dy) {
    for (int dx = 0; dx <= 2 * reach; ++dx) sum += energy[(row + dy) * pitch + column + dx];
  }
  const Real norm = sqrt(sum), smallest = Real(kSmallestNorm);
  // A NaN stays one.
  scale[(image * map.height + top + row) * map.width + left + column] = Real(1) / (norm < smallest ? smallest : norm);
}

template <class T>
void launch_norms(const Features& f, const MatchParams& p, device_acc_t<T>* scale, cudaStream_t stream) {
  const int64_t tiles_x = ceil_div<int64_t>(f.width, kNormWidth), tiles_y = ceil_div<int64_t>(f.height, kNormHeight);
  const int64_t pixels = (kNormWidth + 2 * p.reach()) * (kNormHeight + 2 * p.reach());
  const Grid grid{dim3(unsigned(p.batch * tiles_x * tiles_y)), dim3(kNormThreads),
                  size_t(pixels) * sizeof(device_acc_t<T>)};
  launch(inverse_norms<T>, grid, stream, FeatureMap<T>::of(f, p.channels), int(p.reach()), int(tiles_x), int(tiles_y),
         scale);
}

// The scale of a site; 1 where the score is not normalised.
template <class Real>
__device__ __forceinline__ Real scale_at(const Real* scale, int64_t site) {
  return scale == nullptr ? Real(1) : scale[site];
}

// ---- patches

// Inner product of the patches around (qy, qx) and (ky, kx), over the places that lie in both grids.
template <class T>
__device__ __forceinline__ device_acc_t<T> patch_product(const FeatureMap<T>& query, const FeatureMap<T>& key,
                                                         int64_t image, int qy, int qx, int ky, int kx, int reach) {
  using Real = device_acc_t<T>;
  const int top = max(-reach, max(-qy, -ky)), left = max(-reach, max(-qx, -kx));
  const int bottom = min(reach, min(query.height - 1 - qy, key.height - 1 - ky));
  const int right = min(reach, min(query.width - 1 - qx, key.width - 1 - kx));
  Real sum[kChannels] = {};
#pragma unroll 1
  for (int c = 0; c < query.channels; c += kChannels) {
#pragma unroll 1
    for (int dy = top; dy <= bottom; ++dy) {
#pragma unroll 1
      for (int dx = left; dx <= right; ++dx) {
        Real a[kChannels], b[kChannels];
        query.load(query.pixel(image, qy + dy, qx + dx), c, a);
        key.load(key.pixel(image, ky + dy, kx + dx), c, b);
#pragma unroll
        for (int k = 0; k < kChannels; ++k) sum[k] += a[k] * b[k];
      }
    }
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// ---- candidates

// The best candidate so far: its score and its place in the window, row by row, which orders a site's candidates as
// their indices do. Of equal scores the smallest place wins, in whatever order they come; a NaN is minus infinity.
template <class Real>
struct Best {
  static constexpr int kNone = INT32_MAX;
  Real score = -Real(INFINITY);
  int place = kNone;

  __device__ __forceinline__ void offer(Real candidate, int at) {
    if (!(candidate == candidate)) candidate = -Real(INFINITY);
    if (candidate > score || (candidate == score && at < place)) score = candidate, place = at;
  }
};

// Where a search ends up.
template <class T>
struct MatchTarget {
  using Real = device_acc_t<T>;
  int64_t* index;
  T* score;
  const Real* query_scale;  // or null
  int key_width, radius_y, radius_x, window_x;

  static MatchTarget of(const MatchParams& p, const Real* query_scale) {
    return {p.index,         static_cast<T*>(p.score), query_scale,      int(p.key.width),
            int(p.radius_y), int(p.radius_x),          int(p.window_x())};
  }
  // `site` of all images; its window is centred at (y, x) of the key.
  __device__ __forceinline__ void write(int64_t site, int y, int x, const Best<Real>& best) const {
    const int dy = best.place / window_x - radius_y, dx = best.place % window_x - radius_x;
    const Real scaled = best.score * scale_at(query_scale, site);
    index[site] = int64_t(y + dy) * key_width + x + dx;
    score[site] = store_as<T>(scaled == scaled ? scaled : -Real(INFINITY));
  }
};

}  // namespace hdrops::patch_match
