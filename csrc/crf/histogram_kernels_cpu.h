// tent_histogram and value_histogram on one instruction set.
#include "common/streaming.h"
#include "crf/lookup_vector.h"

namespace hdrops {
namespace HDROPS_ISA {

// relu(1 - |scale * x - centre|); NaN stays NaN.
template <int N, class A>
HDROPS_HD vec<A, N> tent(vec<A, N> x, vec<A, N> scale, vec<A, N> centre) {
  auto distance = scale * x - centre;
  auto height = A(1) - (distance < splat<N>(A(0)) ? -distance : distance);
  return height < splat<N>(A(0)) ? vec<A, N>{} : height;
}

// One tent map of a piece of a plane.
template <int N, class T, class A>
HDROPS_HD int64_t tent_plane(const T* x, T* map, int64_t i, int64_t end, A scale, A centre, bool stream) {
  for (; i + N <= end; i += N) {
    auto height = tent<N, A>(load_wide<N>(x + i), splat<N>(scale), splat<N>(centre));
    if (stream) {
      store_streaming<N>(map + i, height);
    } else {
      store_narrow<N>(map + i, height);
    }
  }
  return i;
}

// Planar: pieces of planes, each read once into the first cache and written to all its maps.
template <class T, class A>
void tent_planes(const TentParams& p, const A* scale, const A* centre, int64_t piece, int64_t begin, int64_t end) {
  constexpr int N = kLanes<A>;
  int64_t pieces = ceil_div(p.p, piece);
  bool stream = worth_streaming<T>(p.n * p.c * p.p * p.tents);
  for (int64_t unit = begin; unit < end; ++unit) {
    int64_t plane = unit / pieces, first = unit % pieces * piece, n = plane / p.c, c = plane % p.c;
    int64_t count = Parts::min(piece, p.p - first);
    const T* x = static_cast<const T*>(p.input) + plane * p.p + first;
    for (int64_t k = 0; k < p.tents; ++k) {
      T* map = static_cast<T*>(p.output) + ((n * p.tents + k) * p.c + c) * p.p + first;
      int64_t head = Parts::min(until_aligned<N>(map), count);
      int64_t i = tent_plane<1>(x, map, 0, head, scale[k], centre[k], false);
      i = tent_plane<N>(x, map, i, count, scale[k], centre[k], stream);
      tent_plane<1>(x, map, i, count, scale[k], centre[k], false);
    }
  }
  streaming_fence();
}

// Maps [i, tents * c) of one pixel of an interleaved image; the tables are per map.
template <int N, class T, class A>
HDROPS_HD int64_t tent_pixel(const T* x, T* maps, const A* scale, const A* centre, const int32_t* channel, int64_t i,
                             int64_t end) {
  for (; i + N <= end; i += N) {
    vec<A, N> value;
    for (int lane = 0; lane < N; ++lane) value[lane] = widen(x[channel[i + lane]]);
    store_narrow<N>(maps + i, tent<N, A>(value, load<N>(scale + i), load<N>(centre + i)));
  }
  return i;
}

template <class T, class A>
void tent_pixels(const TentParams& p, const A* scale, const A* centre, const int32_t* channel, int64_t begin,
                 int64_t end) {
  int64_t maps = p.tents * p.c;
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const T* x = static_cast<const T*>(p.input) + pixel * p.c;
    T* output = static_cast<T*>(p.output) + pixel * maps;
    int64_t i = tent_pixel<kLanes<A>>(x, output, scale, centre, channel, 0, maps);
    tent_pixel<1>(x, output, scale, centre, channel, i, maps);
  }
}

// dL/dx of one value, whose maps lie `stride` apart from `grad` on.
template <class T, class A>
HDROPS_HD A tent_slope(A x, const T* grad, int64_t stride, const int64_t* bins, int64_t bin_count) {
  A sum = 0;
  for (int64_t j = 0; j < bin_count; ++j) {
    sum += tent_set_slope(x, bins[j], [=](int64_t i) { return widen(grad[i * stride]); });
    grad += (bins[j] + 1) * stride;
  }
  return sum;
}

// Values [begin, end) of the input in memory order.
template <class T>
void tent_backward(const TentParams& p, int64_t begin, int64_t end) {
  using A = decltype(widen(T{}));
  int64_t plane_stride = p.interleaved ? 1 : p.p, stride = p.c * plane_stride;
  for (int64_t i = begin; i < end; ++i) {
    int64_t outer = p.interleaved ? i / p.c : i / (p.c * p.p);  // a pixel's, or an image's number
    int64_t inner = p.interleaved ? i % p.c : i % (p.c * p.p);
    const T* grad = static_cast<const T*>(p.grad_output) + outer * p.tents * stride + inner;
    A x = widen(static_cast<const T*>(p.input)[i]);
    narrow(tent_slope<T, A>(x, grad, stride, p.bins, p.bin_count), static_cast<T*>(p.grad_input) + i);
  }
}

// Where pixels of [-1, 1] lie among the bins; a NaN lies at 0.
template <int N, class A>
HDROPS_HD vec<A, N> bin_position(vec<A, N> x, int64_t bins) {
  auto position = (x + A(1)) * (A(bins - 1) / 2);
  return vmin(vmax(position, splat<N>(A(0))), splat<N>(A(bins - 1)));
}

template <int N, class T, class A>
HDROPS_HD int64_t count_values(const ValueHistogramParams& p, const Run& run, double* sums, int32_t copies, int64_t i) {
  const T* input = static_cast<const T*>(p.input) + run.offset;
  LaneCurves<N> channels((run.channel + i) % p.layout.width, p.layout.width, p.bins);
  auto copy = lane_copies<N>(copies);
  for (; i + N <= run.count; i += N, channels.advance()) {
    vec<A, N> value = bin_position<N, A>(load_wide<N>(input + i), p.bins);
    auto bin = __builtin_convertvector(value, vec<int32_t, N>) + channels.begin;
    add_to_bins<N>(sums, bin * copies + copy, value);
  }
  return i;
}

template <class T>
void count_value_parts(const ValueHistogramParams& p, double* sums, const Parts& parts, int64_t begin, int64_t end) {
  using A = decltype(widen(T{}));
  alignas(64) double local[kLocalSums];
  int64_t table_size = p.layout.width * p.bins;
  int32_t copies = copies_of_bins(table_size);
  for (int64_t unit = begin; unit < end; ++unit) {
    int64_t group = unit / parts.per_group, part = unit % parts.per_group;
    double* total = sums + unit * table_size;
    double* bins = copies == 1 ? total : local;
    memset(bins, 0, size_t(table_size * copies) * sizeof(double));
    for (int64_t pixel = parts.begin(part); pixel < parts.begin(part + 1);) {
      Run run = run_at(p.layout, group, pixel, parts.begin(part + 1));
      int64_t i = count_values<kLanes<A>, T, A>(p, run, bins, copies, 0);
      count_values<1, T, A>(p, run, bins, copies, i);
      pixel += run.count;
    }
    if (bins != total) fold_copies(local, table_size, 1, copies, total);
  }
}

template <int N, class T, class A>
HDROPS_HD int64_t value_slopes(const ValueHistogramParams& p, const Run& run, const A* slopes, int64_t i) {
  const T* input = static_cast<const T*>(p.input) + run.offset;
  T* grad_input = static_cast<T*>(p.grad_input) + run.offset;
  LaneCurves<N> channels((run.channel + i) % p.layout.width, p.layout.width, p.bins);
  for (; i + N <= run.count; i += N, channels.advance()) {
    vec<A, N> x = load_wide<N>(input + i);
    auto bin = __builtin_convertvector(bin_position<N, A>(x, p.bins), vec<int32_t, N>) + channels.begin;
    auto inside = (x >= splat<N>(A(-1))) & (x <= splat<N>(A(1)));
    store_narrow<N>(grad_input + i, inside ? gather<N>(slopes, bin) : vec<A, N>{});
  }
  return i;
}

template <class T, class A>
void value_slope_parts(const ValueHistogramParams& p, const A* slopes, const Parts& parts, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    int64_t group = unit / parts.per_group, part = unit % parts.per_group;
    const A* table = slopes + group * p.layout.width * p.bins;
    for (int64_t pixel = parts.begin(part); pixel < parts.begin(part + 1);) {
      Run run = run_at(p.layout, group, pixel, parts.begin(part + 1));
      int64_t i = value_slopes<kLanes<A>, T, A>(p, run, table, 0);
      value_slopes<1, T, A>(p, run, table, i);
      pixel += run.count;
    }
  }
}

}  // namespace HDROPS_ISA
}  // namespace hdrops
