// What the passes over features share: which places of a patch lie in a grid, the norms of patches, and copies with
// channels last.
// Included inside foreach_isa.h's sources; no include guard.
namespace hdrops {
namespace HDROPS_ISA {

using patch_match::Features;

inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Places of a patch along one axis, relative to its centre.
struct Taps {
  int64_t first, last;

  // Those of a patch around `at` that lie in a grid of that size.
  Taps inside(int64_t at, int64_t size) const { return {larger(first, -at), smaller(last, size - 1 - at)}; }
  int64_t count() const { return last - first + 1; }
};

// Whether a pixel lies in a grid. Coordinates as unsigned numbers: one comparison for both ends.
HDROPS_HD bool within(int64_t y, int64_t x, int64_t height, int64_t width) {
  return uint64_t(y) < uint64_t(height) && uint64_t(x) < uint64_t(width);
}

// The element after which a feature map's row y of one channel (contiguous) or of all (channels last) begins.
inline int64_t row_begin(const Features& f, int64_t channels, int64_t image, int64_t y) {
  return f.channels_last ? (image * f.height + y) * f.width * channels
                         : image * channels * f.height * f.width + y * f.width;
}

// By what a score is multiplied for the patch at each site: 1 / max(norm, kSmallestNorm), or 1 where the score is not
// normalised. NaN outside the grid, so that no comparison chooses a site there.
template <class Real>
struct ScaleMap {
  const Real* data;
  int64_t height, pitch, left;  // pitch: elements of a row; left: of them, those before the grid

  const Real* row(int64_t image, int64_t y) const { return data + (image * height + y) * pitch + left; }
};

// Computes a ScaleMap in two passes over rows: the energy of every pixel, then the box sums.
template <class T>
struct PatchNorms {
  using Real = wide_t<T>;
  const Features& features;
  int64_t batch, channels, reach;
  int64_t left, right;  // elements around the grid's rows
  Real* energy;         // [N][H][W]
  Real* scale;          // [N][H][left + W + right]

  int64_t pitch() const { return left + features.width + right; }

  static void run_energy(void* context, int64_t, int64_t unit) {
    auto& self = *static_cast<PatchNorms*>(context);
    const Features& f = self.features;
    const int64_t channels = self.channels, width = f.width, image = unit / f.height, y = unit % f.height;
    const T* source = static_cast<const T*>(f.data) + row_begin(f, channels, image, y);
    Real* energy = self.energy + unit * width;
    if (f.channels_last) {
      for (int64_t x = 0; x < width; ++x) energy[x] = square_sum(source + x * channels, channels);
    } else {
      for (int64_t x = 0; x < width; ++x) energy[x] = 0;
      for (int64_t c = 0; c < channels; ++c) add_squares(source + c * f.height * width, width, energy);
    }
  }

  static Real square_sum(const T* source, int64_t count) {
    constexpr int lanes = kLanes<Real>;
    vec<Real, lanes> sum{};
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) {
      auto value = load_wide<lanes>(source + i);
      sum += value * value;
    }
    Real total = reduce_add<Real, lanes>(sum);
    for (; i < count; ++i) total += widen(source[i]) * widen(source[i]);
    return total;
  }

  static void add_squares(const T* source, int64_t count, Real* sum) {
    constexpr int lanes = kLanes<Real>;
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) {
      auto value = load_wide<lanes>(source + i);
      store<lanes>(sum + i, load<lanes>(sum + i) + value * value);
    }
    for (; i < count; ++i) sum[i] += widen(source[i]) * widen(source[i]);
  }

  static void run_scale(void* context, int64_t, int64_t unit) {
    auto& self = *static_cast<PatchNorms*>(context);
    const Features& f = self.features;
    const int64_t width = f.width, y = unit % f.height, reach = self.reach;
    Real* scale = self.scale + unit * self.pitch();
    for (int64_t x = 0; x < self.pitch(); ++x) scale[x] = Real(__builtin_nan(""));
    scale += self.left;
    for (int64_t x = 0; x < width; ++x) scale[x] = f.normalize ? 0 : 1;
    if (!f.normalize) return;
    for (int64_t d = -reach; d <= reach; ++d) {
      if (y + d < 0 || y + d >= f.height) continue;
      const Real* energy = self.energy + (unit + d) * width;
      for (int64_t x = 0; x < width; ++x) scale[x] += energy[x];
    }
    sum_along(scale, width, reach);
    const Real smallest = Real(patch_match::kSmallestNorm);
    for (int64_t x = 0; x < width; ++x) {
      Real norm = sizeof(Real) == 8 ? Real(__builtin_sqrt(scale[x])) : Real(__builtin_sqrtf(float(scale[x])));
      scale[x] = 1 / (norm < smallest ? smallest : norm);  // a NaN stays one
    }
  }

  // Sums of 2 * reach + 1 neighbours in a row, in place.
  static void sum_along(Real* row, int64_t count, int64_t reach) {
    Real behind[3] = {0, 0, 0};  // the values before row[x], which have been overwritten, the nearest first
    for (int64_t x = 0; x < count; ++x) {
      Real here = row[x], sum = here;
      for (int64_t d = 0; d < reach; ++d) sum += behind[d];
      for (int64_t d = 1; d <= reach && x + d < count; ++d) sum += row[x + d];
      row[x] = sum;
      behind[2] = behind[1], behind[1] = behind[0], behind[0] = here;
    }
  }
};

// Owns a ScaleMap.
template <class T>
class ScaleMemory {
 public:
  using Real = wide_t<T>;
  ScaleMemory(const Features& features, int64_t batch, int64_t channels, int64_t reach, int64_t left, int64_t right)
      : energy_(features.normalize ? batch * features.height * features.width * int64_t(sizeof(Real)) : 0),
        scale_(batch * features.height * (left + features.width + right) * int64_t(sizeof(Real))),
        map_{static_cast<const Real*>(scale_.data()), features.height, left + features.width + right, left} {
    PatchNorms<T> pass{features,
                       batch,
                       channels,
                       reach,
                       left,
                       right,
                       static_cast<Real*>(energy_.data()),
                       static_cast<Real*>(scale_.data())};
    if (features.normalize) parallel_units(batch * features.height, PatchNorms<T>::run_energy, &pass);
    parallel_units(batch * features.height, PatchNorms<T>::run_scale, &pass);
  }
  const ScaleMap<Real>& map() const { return map_; }

 private:
  Buffer energy_, scale_;
  ScaleMap<Real> map_;
};

// Features with channels last, padded with zeros as their owner wants: pixels side by side are one run of reals.
template <class Real>
struct PixelImage {
  const Real* data;
  int64_t channels, height, width;  // padded channels

  const Real* pixel(int64_t image, int64_t y, int64_t x) const {
    return data + ((image * height + y) * width + x) * channels;
  }
  int64_t row() const { return width * channels; }
};

// Owns the copy that a PixelImage needs, if it needs one.
template <class T>
class PixelMemory {
 public:
  using Real = wide_t<T>;
  // Channels are padded to a multiple of `step`.
  PixelMemory(const Features& features, int64_t batch, int64_t channels, bool wanted, int64_t step = kLanes<Real>)
      : features_(features),
        channels_(channels),
        image_{static_cast<const Real*>(features.data), round_up<int64_t>(channels, step), features.height,
               features.width},
        in_place_(sizeof(T) == sizeof(Real) && features.channels_last && image_.channels == channels),
        memory_(wanted && !in_place_ ? batch * image_.height * image_.row() * int64_t(sizeof(Real)) : 0) {
    if (!wanted || in_place_) return;
    image_.data = static_cast<const Real*>(memory_.data());
    parallel_units(batch * image_.height, run, this);
  }
  const PixelImage<Real>& image() const { return image_; }

 private:
  // Copies one row.
  static void run(void* context, int64_t, int64_t unit) {
    auto& self = *static_cast<PixelMemory*>(context);
    const Features& f = self.features_;
    const PixelImage<Real>& to = self.image_;
    const int64_t channels = self.channels_;
    Real* target = static_cast<Real*>(self.memory_.data()) + unit * to.row();
    if (to.channels != channels) __builtin_memset(target, 0, size_t(to.row()) * sizeof(Real));
    const T* source = static_cast<const T*>(f.data) + row_begin(f, channels, unit / f.height, unit % f.height);
    if (f.channels_last) {
      for (int64_t x = 0; x < f.width; ++x) widen_row(source + x * channels, channels, target + x * to.channels);
      return;
    }
    constexpr int64_t kBlock = 64;  // pixels whose channels stay in the first-level cache
    for (int64_t x = 0; x < f.width; x += kBlock) {
      int64_t count = f.width - x < kBlock ? f.width - x : kBlock;
      copy_transposed(source + x, f.height * f.width, target + x * to.channels, to.channels, channels, count);
      if (unit % f.height + 1 < f.height) fetch_planes(source + f.width + x, f.height * f.width, channels, count);
    }
  }

  const Features& features_;
  int64_t channels_;
  PixelImage<Real> image_;
  bool in_place_;
  Buffer memory_;
};

}  // namespace HDROPS_ISA
}  // namespace hdrops
