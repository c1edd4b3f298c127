// Backward pass of the score on the GPU, the matches given.
//
// With a(k) and b(j) the scales of the patches (1 where the score is not normalised) and g the score's gradient, site k
// and its match j = match(k) give
//   grad_query[k + d] += g a b key[j + d]   - g score a^2 query[k + d]
//   grad_key  [j + d] += g a b query[k + d] - g score b^2 key[j + d]
// for every place d of the patch; the second terms are the norms' and vanish where a norm is held at its smallest. A
// score that is not finite has no gradient.
//
//   1. Three factors for each site, by its score computed once more.
//   2. The query's gradient is gathered: a thread owns 4 channels of a pixel and reads its neighbours' matches.
//   3. The key's is added up by reductions (common/gradient_sum_cuda.cuh). A thread owns 4 channels of a query's pixel
//      and goes through the patches that it lies in; where neighbours match alike, as they mostly do, their factors are
//      added first and reach memory as one. The second terms are one number for each patch: they are added up for the
//      match, and their sum over the patches of a pixel is multiplied by that pixel when the sums are brought into the
//      gradient's type and layout.
//
// Only the third step depends on the order of threads, and not in deterministic mode.
//
// Workspace, in numbers of 4 bytes (8 for float64): the norms, 3 for each site, and for the key's gradient a sum for
// each of its elements, channels in whole fours, and for each site of the key; of 8.5 bytes in deterministic mode (16.5
// for float64).
#pragma once
#include "common/gradient_sum_cuda.cuh"
#include "patch_match/match_cuda.cuh"

namespace hdrops::patch_match {

constexpr int kBackwardThreads = 256;

// What the sites weigh in the gradients, [N][Hq][Wq]: on the other's patch, and on each one's own.
template <class Real>
struct SiteFactors {
  Real *other, *query, *key;
};

template <class T>
struct ScoreGradient {
  using Real = device_acc_t<T>;
  FeatureMap<T> query, key;
  Scales<Real> scales;
  SiteFactors<Real> factors;
  const int64_t* match;
  const T* grad_score;
  T *grad_query, *grad_key;
  int reach, chunks;  // chunks of kChannels
  int64_t batch;

  __device__ __forceinline__ int64_t sites() const { return int64_t(query.height) * query.width; }
  __device__ __forceinline__ int64_t key_sites() const { return int64_t(key.height) * key.width; }
  __device__ __forceinline__ int64_t match_of(int64_t site) const {
    const int64_t index = match[site], last = key_sites() - 1;
    return index < 0 ? 0 : index > last ? last : index;
  }
};

// A thread's share of a map [N, C, H, W]: kChannels channels of a pixel. Neighbouring threads have neighbouring
// chunks of a pixel, or neighbouring pixels.
struct PixelChunk {
  int64_t image;
  int y, x, channel;
  bool exists;

  template <class T>
  __device__ __forceinline__ static PixelChunk mine(const FeatureMap<T>& map, int64_t batch, int chunks,
                                                    bool along_channels) {
    const int64_t pixels = int64_t(map.height) * map.width, all = batch * pixels * chunks;
    const int64_t index = int64_t(blockIdx.x) * kBackwardThreads + threadIdx.x;
    PixelChunk p{};
    p.exists = index < all;
    if (!p.exists) return p;
    const int64_t chunk = along_channels ? index % chunks : index / pixels % chunks;
    const int64_t pixel = along_channels ? index / chunks % pixels : index % pixels;
    p.image = index / (pixels * chunks);
    p.y = int(pixel / map.width), p.x = int(pixel % map.width), p.channel = int(chunk) * kChannels;
    return p;
  }
};

template <class T>
Grid chunk_grid(const Features& f, const MatchParams& p) {
  const int64_t all = p.batch * f.height * f.width * ceil_div<int64_t>(p.channels, kChannels);
  return {dim3(unsigned(ceil_div<int64_t>(all, kBackwardThreads))), dim3(kBackwardThreads)};
}

// A gradient lies in memory as its map does.
template <class T>
__device__ __forceinline__ void store_chunk(const FeatureMap<T>& map, T* gradient, const PixelChunk& p,
                                            const device_acc_t<T> (&value)[kChannels]) {
  T* to = gradient + p.image * map.image_stride + (int64_t(p.y) * map.width + p.x) * map.pixel_stride;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    if (p.channel + i < map.channels) to[(p.channel + i) * map.channel_stride] = store_as<T>(value[i]);
  }
}

// sum += factor * the pixel of p in `map`. A factor of zero keeps a NaN of features that the score does not see out.
template <class T>
__device__ __forceinline__ void add_pixel(const FeatureMap<T>& map, const PixelChunk& p, int y, int x,
                                          device_acc_t<T> factor, device_acc_t<T> (&sum)[kChannels]) {
  if (factor == 0) return;
  device_acc_t<T> value[kChannels];
  map.load(map.pixel(p.image, y, x), p.channel, value);
#pragma unroll
  for (int i = 0; i < kChannels; ++i) sum[i] += factor * value[i];
}

template <class Real>
__device__ __forceinline__ Real own_factor(bool normalized, Real scale, Real score_gradient) {
  const bool held = !normalized || scale >= Real(1) / Real(kSmallestNorm);
  return held ? Real(0) : -score_gradient * scale * scale;
}

// A site a thread.
template <class T>
__global__ void __launch_bounds__(kBackwardThreads) site_factors(ScoreGradient<T> s) {
  using Real = device_acc_t<T>;
  const int64_t site = int64_t(blockIdx.x) * kBackwardThreads + threadIdx.x;
  if (site >= s.batch * s.sites()) return;
  const int64_t image = site / s.sites(), at = site % s.sites(), match = s.match_of(site);
  const Real a = scale_at(s.scales.query, site), b = scale_at(s.scales.key, image * s.key_sites() + match);
  const Real product = patch_product(s.query, s.key, image, int(at / s.query.width), int(at % s.query.width),
                                     int(match / s.key.width), int(match % s.key.width), s.reach);
  const Real score = product * a * b, g = load_as(s.grad_score[site]);
  const bool finite = score - score == 0;
  s.factors.other[site] = finite ? g * a * b : Real(0);
  s.factors.query[site] = finite ? own_factor(s.scales.query != nullptr, a, g * score) : Real(0);
  s.factors.key[site] = finite ? own_factor(s.scales.key != nullptr, b, g * score) : Real(0);
}

template <class T>
__global__ void __launch_bounds__(kBackwardThreads) gather_query_gradient(ScoreGradient<T> s) {
  using Real = device_acc_t<T>;
  const auto p = PixelChunk::mine(s.query, s.batch, s.chunks, s.query.channel_stride == 1);
  if (!p.exists) return;
  Real sum[kChannels] = {}, own = 0;
  for (int dy = -s.reach; dy <= s.reach; ++dy) {
    for (int dx = -s.reach; dx <= s.reach; ++dx) {
      if (!s.query.contains(p.y - dy, p.x - dx)) continue;
      const int64_t site = p.image * s.sites() + int64_t(p.y - dy) * s.query.width + p.x - dx;
      own += s.factors.query[site];
      const int64_t match = s.match_of(site);
      const int y = int(match / s.key.width) + dy, x = int(match % s.key.width) + dx;
      if (s.key.contains(y, x)) add_pixel(s.key, p, y, x, s.factors.other[site], sum);
    }
  }
  add_pixel(s.query, p, p.y, p.x, own, sum);
  store_chunk(s.query, s.grad_query, p, sum);
}

// Where the key's gradient is added up: [N][Hk][Wk][channels in whole chunks], and the norms' terms [N][Hk][Wk].
template <class Sum>
struct KeySums {
  Sum features, own;

  __device__ __forceinline__ void prepare() { features.prepare(), own.prepare(); }
};

// The norms' terms, for the match as a whole. A site a thread.
template <class T, class Sum>
__global__ void __launch_bounds__(kBackwardThreads) scatter_own_terms(ScoreGradient<T> s, KeySums<Sum> sums) {
  const int64_t site = int64_t(blockIdx.x) * kBackwardThreads + threadIdx.x;
  if (site >= s.batch * s.sites()) return;
  sums.prepare();
  const device_acc_t<T> factor = s.factors.key[site];
  if (factor != 0) sums.own.add_one(site / s.sites() * s.key_sites() + s.match_of(site), factor);
}

// Adds factor * value to a pixel of the key.
template <class T, class Sum>
__device__ __forceinline__ void add_to_key(const ScoreGradient<T>& s, const Sum& sum, const PixelChunk& p,
                                           int64_t pixel, device_acc_t<T> factor,
                                           const device_acc_t<T> (&value)[kChannels]) {
  using Real = device_acc_t<T>;
  const int64_t at = (p.image * s.key_sites() + pixel) * s.chunks * kChannels + p.channel;
#pragma unroll
  for (int i = 0; i < kChannels; i += Sum::kWidth) {
    Real product[Sum::kWidth];
#pragma unroll
    for (int k = 0; k < Sum::kWidth; ++k) product[k] = factor * value[i + k];
    if (p.channel + i < s.query.channels) sum.add(at + i, product);
  }
}

template <class T, class Sum>
__global__ void __launch_bounds__(kBackwardThreads) scatter_key_gradient(ScoreGradient<T> s, KeySums<Sum> sums) {
  using Real = device_acc_t<T>;
  const auto p = PixelChunk::mine(s.query, s.batch, s.chunks, true);
  if (!p.exists) return;
  sums.prepare();
  Real value[kChannels];
  s.query.load(s.query.pixel(p.image, p.y, p.x), p.channel, value);
  int64_t pixel = -1;
  Real factor = 0;
  for (int dy = -s.reach; dy <= s.reach; ++dy) {
    for (int dx = -s.reach; dx <= s.reach; ++dx) {
      if (!s.query.contains(p.y - dy, p.x - dx)) continue;
      const int64_t site = p.image * s.sites() + int64_t(p.y - dy) * s.query.width + p.x - dx;
      const int64_t match = s.match_of(site);
      const int y = int(match / s.key.width) + dy, x = int(match % s.key.width) + dx;
      const Real other = s.factors.other[site];
      if (other == 0 || !s.key.contains(y, x)) continue;
      const int64_t to = int64_t(y) * s.key.width + x;
      if (to != pixel && pixel >= 0) add_to_key(s, sums.features, p, pixel, factor, value);
      factor = to == pixel ? factor + other : other;
      pixel = to;
    }
  }
  if (pixel >= 0) add_to_key(s, sums.features, p, pixel, factor, value);
}

template <class T, class Sum>
__global__ void __launch_bounds__(kBackwardThreads) finish_key_gradient(ScoreGradient<T> s, KeySums<Sum> sums) {
  using Real = device_acc_t<T>;
  const auto p = PixelChunk::mine(s.key, s.batch, s.chunks, s.key.channel_stride == 1);
  if (!p.exists) return;
  sums.prepare();
  Real own = 0;
  for (int dy = -s.reach; dy <= s.reach; ++dy) {
    for (int dx = -s.reach; dx <= s.reach; ++dx) {
      if (!s.key.contains(p.y - dy, p.x - dx)) continue;
      own += sums.own.value(p.image * s.key_sites() + int64_t(p.y - dy) * s.key.width + p.x - dx);
    }
  }
  const int64_t at = p.image * s.key_sites() + int64_t(p.y) * s.key.width + p.x;
  Real sum[kChannels];
#pragma unroll
  for (int i = 0; i < kChannels; ++i) sum[i] = sums.features.value(at * s.chunks * kChannels + p.channel + i);
  add_pixel(s.key, p, p.y, p.x, own, sum);
  store_chunk(s.key, s.grad_key, p, sum);
}

template <class T>
struct MatchBackward {
  using Real = device_acc_t<T>;

  const MatchParams& p;
  ScoreGradient<T> score;
  KeySums<FloatSum<Real>> float_sums;
  KeySums<FixedSum<Real>> fixed_sums;
  char *sums_begin, *sums_end;
  int64_t workspace_bytes;

  MatchBackward(const MatchParams& params, void* workspace) : p(params) {
    Pieces pieces{static_cast<char*>(workspace), 0};
    const int64_t sites = p.batch * p.sites();
    score.query = FeatureMap<T>::of(p.query, p.channels), score.key = FeatureMap<T>::of(p.key, p.channels);
    score.scales = Scales<Real>::take(p, pieces);
    score.factors.other = pieces.take<Real>(sites);
    score.factors.query = pieces.take<Real>(sites);
    score.factors.key = pieces.take<Real>(sites);
    score.match = p.match, score.grad_score = static_cast<const T*>(p.grad_score);
    score.grad_query = static_cast<T*>(p.grad_query), score.grad_key = static_cast<T*>(p.grad_key);
    score.reach = int(p.reach()), score.chunks = int(ceil_div<int64_t>(p.channels, kChannels));
    score.batch = p.batch;
    // The sums one after another, to be cleared together.
    const int64_t own = p.batch * p.key.height * p.key.width, features = own * score.chunks * kChannels;
    sums_begin = pieces.base + pieces.used;
    if (p.grad_key != nullptr && p.deterministic) {
      fixed_sums.features = fixed_sum(pieces, features, 2, p.sites() * p.patch_size * p.patch_size);
      fixed_sums.own = fixed_sum(pieces, own, 1, p.sites());
    } else if (p.grad_key != nullptr) {
      float_sums.features.sums = pieces.take<Real>(features);
      float_sums.own.sums = pieces.take<Real>(own);
    }
    sums_end = pieces.base + pieces.used;
    workspace_bytes = pieces.used;
  }

  static FixedSum<Real> fixed_sum(Pieces& pieces, int64_t count, int factors, int64_t contributions) {
    int64_t* high = pieces.take<int64_t>(count);
    int64_t* low = FixedSum<Real>::kTwoWords ? pieces.take<int64_t>(count) : nullptr;
    unsigned* flags = pieces.take<unsigned>(ceil_div<int64_t>(count, 8));
    return {high, low, flags, pieces.take<Exponents>(1), factors, 0, ceil_log2(contributions), 1, 1};
  }

  static int* largest(const FixedSum<Real>& sum, int factor) {
    return const_cast<int*>(&sum.exponents->factor[factor]);
  }

  template <class Sum>
  void add_up_key(const KeySums<Sum>& sums, cudaStream_t stream) const {
    const Grid of_sites = site_grid();
    if (p.key.normalize) launch(scatter_own_terms<T, Sum>, of_sites, stream, score, sums);
    launch(scatter_key_gradient<T, Sum>, chunk_grid<T>(p.query, p), stream, score, sums);
    launch(finish_key_gradient<T, Sum>, chunk_grid<T>(p.key, p), stream, score, sums);
  }

  Grid site_grid() const {
    return {dim3(unsigned(ceil_div<int64_t>(p.batch * p.sites(), kBackwardThreads))), dim3(kBackwardThreads)};
  }

  void run(cudaStream_t stream) const {
    launch_scales<T>(p, score.scales, stream);
    launch(site_factors<T>, site_grid(), stream, score);
    if (p.grad_query != nullptr) {
      launch(gather_query_gradient<T>, chunk_grid<T>(p.query, p), stream, score);
    }
    if (p.grad_key == nullptr) return;
    launch_fill_zero(sums_begin, sums_end - sums_begin, stream);
    if (!p.deterministic) return add_up_key(float_sums, stream);
    const int64_t sites = p.batch * p.sites();
    launch_scan<Real>(score.factors.other, sites, largest(fixed_sums.features, 0), stream);
    launch_scan<T>(p.query.data, sites * p.channels, largest(fixed_sums.features, 1), stream);
    launch_scan<Real>(score.factors.key, sites, largest(fixed_sums.own, 0), stream);
    add_up_key(fixed_sums, stream);
  }
};

template <class T>
size_t match_backward_workspace_bytes(const MatchParams& params) {
  return size_t(MatchBackward<T>(params, nullptr).workspace_bytes);
}

template <class T>
void match_backward_cuda(const MatchParams& params, void* workspace, cudaStream_t stream) {
  MatchBackward<T>(params, workspace).run(stream);
}

}  // namespace hdrops::patch_match
