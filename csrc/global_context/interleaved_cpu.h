// What the kernels do to a run of pixels of a channels-last image: x(c, p) = x[p * channels + c]. The functions are
// those of planar_cpu.h; vectors run along channels.
namespace hdrops {
namespace HDROPS_ISA {
namespace context {

template <class T, class A>
struct Interleaved {
  int64_t channels, plane;  // `plane` is not used

  static constexpr int L = kLanes<A>;

  int64_t offset(int64_t p) const { return p * channels; }

  // The V dot products of Rows pixels.
  template <int Rows, int V>
  HDROPS_HD void dot_pixels(const T* x, const A* const* factors, A* const* sums, int64_t p) const {
    static_assert(Rows == 4 || Rows == 1);
    vec<A, L> total[V][4] = {};
    A tail[V][4] = {};
    int64_t c = 0;
    for (; c + L <= channels; c += L) {
      for (int v = 0; v < V; ++v) {
        auto factor = load<L>(factors[v] + c);
        for (int r = 0; r < Rows; ++r) total[v][r] += factor * load_wide<L>(x + r * channels + c);
      }
    }
    for (; c < channels; ++c) {
      for (int v = 0; v < V; ++v) {
        for (int r = 0; r < Rows; ++r) tail[v][r] += factors[v][c] * widen(x[r * channels + c]);
      }
    }
    for (int v = 0; v < V; ++v) {
      A whole[4];
      reduce_four<A, L>(total[v][0], total[v][1], total[v][2], total[v][3], whole, whole + 1, whole + 2, whole + 3);
      for (int r = 0; r < Rows; ++r) sums[v][p + r] = whole[r] + tail[v][r];
    }
  }

  template <int V>
  void dots(const T* x, int64_t count, const A* const (&factors)[V], A* const (&sums)[V]) const {
    int64_t p = 0;
    for (; p + 4 <= count; p += 4) dot_pixels<4, V>(x + p * channels, factors, sums, p);
    for (; p < count; ++p) dot_pixels<1, V>(x + p * channels, factors, sums, p);
  }

  // Terms of the sums over pixels, for N channels of pixel p.
  struct Weighted {
    const T* x;
    const A* weights;
    int64_t channels;
    template <int N>
    HDROPS_HD vec<A, N> term(int64_t p, int64_t c) const {
      return weights[p] * load_wide<N>(x + p * channels + c);
    }
  };

  template <bool kProduct>
  struct Products {
    const T *g, *x;
    int64_t channels;
    template <int N>
    HDROPS_HD vec<A, N> term(int64_t p, int64_t c) const {
      auto value = load_wide<N>(g + p * channels + c);
      if constexpr (kProduct) value *= load_wide<N>(x + p * channels + c);
      return value;
    }
  };

  // sums of `Vectors` vectors of N channels from c on.
  template <int N, int Vectors, class F>
  static HDROPS_HD void sum_channels(const F& terms, int64_t count, int64_t c, A* sums) {
    vec<A, N> total[Vectors] = {};
    for (int64_t p = 0; p < count; ++p) {
      for (int k = 0; k < Vectors; ++k) total[k] += terms.template term<N>(p, c + k * N);
    }
    for (int k = 0; k < Vectors; ++k) store<N>(sums + c + k * N, total[k]);
  }

  template <class F>
  HDROPS_HD void sum_pixels(const F& terms, int64_t count, A* sums) const {
    int64_t c = 0;
    for (; c + 8 * L <= channels; c += 8 * L) sum_channels<L, 8>(terms, count, c, sums);
    for (; c + 4 * L <= channels; c += 4 * L) sum_channels<L, 4>(terms, count, c, sums);
    for (; c + L <= channels; c += L) sum_channels<L, 1>(terms, count, c, sums);
    for (; c < channels; ++c) sum_channels<1, 1>(terms, count, c, sums);
  }

  // What lies ahead follows on in memory, and is fetched without being asked for.
  void weighted_sums(const T* x, int64_t count, const A* weights, A* sums, int64_t) const {
    sum_pixels(Weighted{x, weights, channels}, count, sums);
  }

  template <bool kProduct>
  void channel_sums(const T* g, const T* x, int64_t count, A* sums) const {
    sum_pixels(Products<kProduct>{g, x, channels}, count, sums);
  }

  // Calls part.one<N>(c, streaming) for all channels; a pixel that does not begin at a vector's address is not
  // streamed.
  template <class F>
  HDROPS_HD void for_pixel(const T* target, bool stream, const F& part) const {
    const bool streaming = stream && until_aligned<L>(target) == 0;
    int64_t c = 0;
    for (; c + L <= channels; c += L) part.template one<L>(c, streaming);
    for (; c < channels; ++c) part.template one<1>(c, false);
  }

  template <bool kMultiply>
  struct FusedPixel {
    const T* x;
    const A* change;
    T* out;
    template <int N>
    HDROPS_HD void one(int64_t c, bool streaming) const {
      auto value = load_wide<N>(x + c);
      if constexpr (kMultiply) {
        value *= load<N>(change + c);
      } else {
        value += load<N>(change + c);
      }
      Planar<T, A>::template put<N>(out + c, value, streaming);
    }
  };

  template <bool kMultiply>
  void fuse(const T* x, int64_t count, const A* change, T* out, bool stream) const {
    for (int64_t p = 0; p < count; ++p) {
      T* pixel = out + p * channels;
      for_pixel(pixel, stream, FusedPixel<kMultiply>{x + p * channels, change, pixel});
    }
  }

  template <bool kGrad, bool kScale>
  struct GradientPixel {
    const T* g;
    const A *scale, *a, *b;
    A weight, slope;
    T* out;
    template <int N>
    HDROPS_HD void one(int64_t c, bool streaming) const {
      auto value = weight * load<N>(a + c) + slope * load<N>(b + c);
      if constexpr (kGrad && kScale) value += load_wide<N>(g + c) * load<N>(scale + c);
      if constexpr (kGrad && !kScale) value += load_wide<N>(g + c);
      Planar<T, A>::template put<N>(out + c, value, streaming);
    }
  };

  template <bool kGrad, bool kScale>
  void input_gradient(const T* g, int64_t count, const A* scale, const A* weights, const A* a, const A* slopes,
                      const A* b, T* out, bool stream) const {
    for (int64_t p = 0; p < count; ++p) {
      T* pixel = out + p * channels;
      const T* grad = kGrad ? g + p * channels : nullptr;
      for_pixel(pixel, stream, GradientPixel<kGrad, kScale>{grad, scale, a, b, weights[p], slopes[p], pixel});
    }
  }
};

}  // namespace context
}  // namespace HDROPS_ISA
}  // namespace hdrops
