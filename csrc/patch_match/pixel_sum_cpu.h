// Weighted sums of pixels, and where they are written: what swapping patches and both gradients consist of. Included
// inside foreach_isa.h's sources; no include guard.
namespace hdrops {
namespace HDROPS_ISA {

// target = sum of weight * run over the runs that were added, in that order.
template <class Real>
class PixelSum {
 public:
  PixelSum(Real* target, int64_t length)
      : target_(target), length_(length), ahead_(length < 8 * kLine ? length : 8 * kLine) {}

  void add(const Real* run, Real weight) {
    if (count_ == kMost) flush();
    // The runs of a sum lie anywhere: all of them are on their way before the first is needed.
    for (int64_t i = 0; i < ahead_; i += kLine) __builtin_prefetch(run + i);
    run_[count_] = run, weight_[count_++] = weight;
  }
  int64_t count() const { return count_; }
  // For sums of at most kMost runs: gives all of them one weight.
  void weigh(Real weight) {
    for (int64_t i = 0; i < count_; ++i) weight_[i] = weight;
  }
  void finish() {
    if (count_ > 0 || !begun_) flush();
  }

  static constexpr int64_t kMost = 64;
  static constexpr int64_t kLine = 64 / int64_t(sizeof(Real));

 private:
  void flush() {
    constexpr int lanes = kLanes<Real>;
    int64_t at = 0;
    for (; at + 8 * lanes <= length_; at += 8 * lanes) sum_vectors<8, lanes>(at);
    for (; at + 4 * lanes <= length_; at += 4 * lanes) sum_vectors<4, lanes>(at);
    for (; at + 2 * lanes <= length_; at += 2 * lanes) sum_vectors<2, lanes>(at);
    for (; at + lanes <= length_; at += lanes) sum_vectors<1, lanes>(at);
    for (; at < length_; ++at) sum_vectors<1, 1>(at);
    count_ = 0, begun_ = true;
  }

  template <int kVectors, int kWidth>
  HDROPS_HD void sum_vectors(int64_t at) {
    vec<Real, kWidth> sum[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sum[v] = begun_ ? load<kWidth>(target_ + at + v * kWidth) : vec<Real, kWidth>{};
    }
    for (int64_t i = 0; i < count_; ++i) {
      const auto weight = splat<kWidth>(weight_[i]);
      const Real* run = run_[i] + at;
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[v] += weight * load<kWidth>(run + v * kWidth);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store<kWidth>(target_ + at + v * kWidth, sum[v]);
  }

  const Real* run_[kMost];
  Real weight_[kMost];
  int64_t count_ = 0;
  bool begun_ = false;
  Real* target_;
  int64_t length_, ahead_;
};

// Pixels of a row that are computed together, so that they can be written plane by plane.
constexpr int64_t kTilePixels = 32;

// An image [N, C, H, W] of type T that tiles of pixels are written to.
template <class T>
struct PixelTarget {
  T* data;
  int64_t channels, height, width;
  bool channels_last;

  // Fetches where `count` pixels from (y, x) on will be written.
  void fetch(int64_t image, int64_t y, int64_t x, int64_t count) const {
    if (channels_last) return;
    fetch_planes(data + image * channels * height * width + y * width + x, height * width, channels, count);
  }

  // `count` pixels from (y, x) on, each a run of `stride` reals of which the first `channels` count.
  template <class Real>
  void write(int64_t image, int64_t y, int64_t x, int64_t count, const Real* pixels, int64_t stride) const {
    if (channels_last) {
      T* target = data + ((image * height + y) * width + x) * channels;
      if (stride == channels) return narrow_row(pixels, count * channels, target);
      for (int64_t i = 0; i < count; ++i) narrow_row(pixels + i * stride, channels, target + i * channels);
    } else {
      T* target = data + image * channels * height * width + y * width + x;
      copy_transposed(pixels, stride, target, height * width, count, channels);
    }
  }
};

}  // namespace HDROPS_ISA
}  // namespace hdrops
