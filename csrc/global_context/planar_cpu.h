// What the kernels do to a run of pixels of an image in planes (NCHW): x(c, p) = x[c * plane + p].
// interleaved_cpu.h has the same functions for channels last.
//
// Sums over channels take four planes at a time, so that the run's sums, which stay in the first-level cache, are read
// and written once for four planes; sums over pixels keep four planes' sums in registers, for as many independent
// chains.
namespace hdrops {
namespace HDROPS_ISA {
namespace context {

template <class T, class A>
struct Planar {
  int64_t channels, plane;

  static constexpr int L = kLanes<A>;
  static constexpr int kTogether = 4;

  // Elements before pixel p.
  int64_t offset(int64_t p) const { return p; }

  // sums[v][p] += sum over Rows channels of factors[v][c] x(c, p), for N pixels.
  template <int N, int Rows, int V>
  HDROPS_HD void add_rows(const T* x, const A* const* factors, A* const* sums) const {
    vec<A, N> total[V];
    for (int v = 0; v < V; ++v) total[v] = load<N>(sums[v]);
    for (int r = 0; r < Rows; ++r) {
      auto value = load_wide<N>(x + r * plane);
      for (int v = 0; v < V; ++v) total[v] += factors[v][r] * value;
    }
    for (int v = 0; v < V; ++v) store<N>(sums[v], total[v]);
  }

  template <int Rows, int V>
  HDROPS_HD void add_channels(const T* x, int64_t count, const A* const* factors, A* const* sums) const {
    const A* at[V];
    A* to[V];
    for (int v = 0; v < V; ++v) at[v] = factors[v], to[v] = sums[v];
    int64_t p = 0;
    for (; p + L <= count; p += L) {
      add_rows<L, Rows, V>(x + p, at, to);
      for (int v = 0; v < V; ++v) to[v] += L;
    }
    for (; p < count; ++p) {
      add_rows<1, Rows, V>(x + p, at, to);
      for (int v = 0; v < V; ++v) ++to[v];
    }
  }

  // sums[v][p] = sum over c of factors[v][c] x(c, p).
  template <int V>
  void dots(const T* x, int64_t count, const A* const (&factors)[V], A* const (&sums)[V]) const {
    for (int v = 0; v < V; ++v) {
      for (int64_t p = 0; p < count; ++p) sums[v][p] = 0;
    }
    const A* at[V];
    int64_t c = 0;
    for (; c + kTogether <= channels; c += kTogether) {
      for (int v = 0; v < V; ++v) at[v] = factors[v] + c;
      add_channels<kTogether, V>(x + c * plane, count, at, sums);
    }
    for (; c < channels; ++c) {
      for (int v = 0; v < V; ++v) at[v] = factors[v] + c;
      add_channels<1, V>(x + c * plane, count, at, sums);
    }
  }

  template <int Rows>
  HDROPS_HD void sum_rows(const T* x, int64_t count, const A* weights, A* sums, int64_t ahead) const {
    vec<A, L> total[4] = {};
    A tail[4] = {};
    int64_t p = 0;
    for (; p + L <= count; p += L) {
      auto weight = load<L>(weights + p);
      for (int r = 0; r < Rows; ++r) {
        __builtin_prefetch(x + r * plane + p + ahead, 0, 2);
        total[r] += weight * load_wide<L>(x + r * plane + p);
      }
    }
    for (; p < count; ++p) {
      for (int r = 0; r < Rows; ++r) tail[r] += weights[p] * widen(x[r * plane + p]);
    }
    A whole[4];
    reduce_four<A, L>(total[0], total[1], total[2], total[3], whole, whole + 1, whole + 2, whole + 3);
    for (int r = 0; r < Rows; ++r) sums[r] = whole[r] + tail[r];
  }

  // sums[c] = sum over p of weights[p] x(c, p). These pixels come from the second-level cache, which leaves the memory
  // time to fetch those that lie `ahead` of them.
  void weighted_sums(const T* x, int64_t count, const A* weights, A* sums, int64_t ahead) const {
    int64_t c = 0;
    for (; c + kTogether <= channels; c += kTogether) {
      sum_rows<kTogether>(x + c * plane, count, weights, sums + c, ahead);
    }
    for (; c < channels; ++c) sum_rows<1>(x + c * plane, count, weights, sums + c, ahead);
  }

  // sums[c] = sum over p of g(c, p), with x of g(c, p) x(c, p).
  template <bool kProduct>
  void channel_sums(const T* g, const T* x, int64_t count, A* sums) const {
    for (int64_t c = 0; c < channels; ++c) {
      const T *grad = g + c * plane, *value = kProduct ? x + c * plane : nullptr;
      vec<A, L> total[4] = {};
      A tail = 0;
      int64_t p = 0;
      for (; p + 4 * L <= count; p += 4 * L) {
        for (int k = 0; k < 4; ++k) total[k] += term<L, kProduct>(grad, value, p + k * L);
      }
      for (; p < count; ++p) tail += term<1, kProduct>(grad, value, p)[0];
      sums[c] = reduce_add<A, L>((total[0] + total[1]) + (total[2] + total[3])) + tail;
    }
  }

  template <int N, bool kProduct>
  static HDROPS_HD vec<A, N> term(const T* g, const T* x, int64_t p) {
    if constexpr (kProduct) return load_wide<N>(g + p) * load_wide<N>(x + p);
    return load_wide<N>(g + p);
  }

  // Calls part<N>(p, streaming) so that every p below count is covered: first until `target` is aligned, then vectors.
  template <class F>
  static HDROPS_HD void for_row(T* target, int64_t count, bool stream, const F& part) {
    int64_t p = 0;
    if (stream) {
      const int64_t head = until_aligned<L>(target) < count ? until_aligned<L>(target) : count;
      for (; p < head; ++p) part.template one<1>(p, false);
    }
    for (; p + L <= count; p += L) part.template one<L>(p, stream);
    for (; p < count; ++p) part.template one<1>(p, false);
  }

  template <bool kMultiply>
  struct FusedRow {
    const T* x;
    A change;
    T* out;
    template <int N>
    HDROPS_HD void one(int64_t p, bool streaming) const {
      auto value = load_wide<N>(x + p);
      if constexpr (kMultiply) {
        value *= change;
      } else {
        value += change;
      }
      put<N>(out + p, value, streaming);
    }
  };

  // out(c, p) = x(c, p) + change[c], or times change[c].
  template <bool kMultiply>
  void fuse(const T* x, int64_t count, const A* change, T* out, bool stream) const {
    for (int64_t c = 0; c < channels; ++c) {
      T* row = out + c * plane;
      for_row(row, count, stream, FusedRow<kMultiply>{x + c * plane, change[c], row});
    }
  }

  template <bool kGrad, bool kScale>
  struct GradientRow {
    const T* g;
    const A *weights, *slopes;
    A scale, a, b;
    T* out;
    template <int N>
    HDROPS_HD void one(int64_t p, bool streaming) const {
      auto value = load<N>(weights + p) * a + load<N>(slopes + p) * b;
      if constexpr (kGrad && kScale) value += load_wide<N>(g + p) * scale;
      if constexpr (kGrad && !kScale) value += load_wide<N>(g + p);
      put<N>(out + p, value, streaming);
    }
  };

  // out(c, p) = g(c, p) scale[c] + weights[p] a[c] + slopes[p] b[c]; without g its term, without scale that factor.
  template <bool kGrad, bool kScale>
  void input_gradient(const T* g, int64_t count, const A* scale, const A* weights, const A* a, const A* slopes,
                      const A* b, T* out, bool stream) const {
    for (int64_t c = 0; c < channels; ++c) {
      T* row = out + c * plane;
      const T* grad = kGrad ? g + c * plane : nullptr;
      const A factor = kScale ? scale[c] : A(1);
      for_row(row, count, stream, GradientRow<kGrad, kScale>{grad, weights, slopes, factor, a[c], b[c], row});
    }
  }

  template <int N>
  static HDROPS_HD void put(T* target, vec<A, N> value, bool streaming) {
    if constexpr (N > 1) {
      if (streaming) return store_streaming<N>(target, value);
    }
    store_narrow<N>(target, value);
  }
};

}  // namespace context
}  // namespace HDROPS_ISA
}  // namespace hdrops
