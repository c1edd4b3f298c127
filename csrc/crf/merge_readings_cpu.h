// Exposure merging, a stream's readings: where they lie, and what one of them says. Compiled per instruction set.
//
// frame_terms() evaluates N readings of a frame at once: the response g, its slope, and the weight w, from tables of
// any length between whose entries is interpolated. 8-bit codes have all that in a table of their own
// (merge_codes_cpu.h).
namespace hdrops {
namespace HDROPS_ISA {

// What one stream has of its own.
template <class T, class A>
struct MergeStream {
  const T* base;  // the stream's first element in frame 0 of the stack
  const int32_t* order;
  const A* log_exposures;
  const A* curve;
  const A* log_curve;
  const A* table;
  int64_t image, plane;
};

template <class T, class A>
MergeStream<T, A> merge_stream(const MergeParams<A>& p, int64_t index) {
  int64_t n = p.interleaved ? index : index / p.channels, c = p.interleaved ? 0 : index % p.channels;
  MergeStream<T, A> s;
  s.base = static_cast<const T*>(p.stack) + n * p.stack_stride_n + c * p.pixels;
  s.order = p.order + n * p.exposure_stride_n;
  s.log_exposures = p.log_exposures + n * p.exposure_stride_n;
  s.curve = p.curve == nullptr ? nullptr : p.curve + n * p.curve_stride_n + c * p.curve_stride_c;
  s.log_curve = p.log_curve == nullptr ? nullptr : p.log_curve + n * p.log_curve_stride_n + c * p.log_curve_stride_c;
  s.table = p.table == nullptr ? nullptr : p.table + n * p.table_stride_n + c * p.table_stride_c;
  s.image = n;
  s.plane = c;
  return s;
}

template <int N, class A, class T>
HDROPS_HD vec<A, N> load_reading(const T* source) {
  if constexpr (kMergeMax<T> > 1) {
    return __builtin_convertvector(load_codes<N>(source), vec<A, N>);
  } else {
    return load_wide<N>(source);
  }
}

template <class A, class T>
HDROPS_HD A reading_of(T value) {
  if constexpr (kMergeMax<T> > 1) {
    return A(value);
  } else {
    return widen(value);
  }
}

// Where a reading falls in a table of `length` entries (OP-6).
template <int N, class A>
struct TablePlace {
  vec<int32_t, N> lower, upper;
  vec<A, N> fraction;
};

// `scale`: steps of the table per unit of a reading. A step of a long table is so small a part of the largest reading
// that neither `scale` nor the product may be rounded before the entry's number is taken off, and that the rounded
// product may name a neighbouring entry.
template <int N, class A>
HDROPS_HD TablePlace<N, A> table_place(vec<A, N> reading, double scale, int64_t length) {
  using Indices = vec<int32_t, N>;
  const A rounded = A(scale), rest = A(scale - double(rounded));
  const Indices last = splat<N>(int32_t(length - 1));
  const Indices near = vmin(__builtin_convertvector(reading * rounded, Indices), last);
  const vec<A, N> number = __builtin_convertvector(near, vec<A, N>);
  const vec<A, N> beyond = multiply_subtract<N>(reading, splat<N>(rounded), number) + reading * rest;
  const Indices step = __builtin_convertvector(beyond + A(1), Indices) - 1;  // -1, 0 or 1: beyond lies in (-1, 2)
  TablePlace<N, A> place;
  place.lower = near + step;
  place.upper = vmin(place.lower + 1, last);
  place.fraction = beyond - __builtin_convertvector(step, vec<A, N>);
  return place;
}

// w of readings in [0, max].
template <class T, int N, class A>
HDROPS_HD vec<A, N> merge_weight(const MergeParams<A>& p, vec<A, N> reading) {
  const double scale = double(p.weight_length - 1) / kMergeMax<T>;
  const vec<A, N> zero = splat<N>(A(0)), one = splat<N>(A(1));
  if (p.weight_length <= 3) {
    vec<A, N> u = reading * A(scale), v = u - A(1);
    return p.hinge[0] + p.hinge[1] * vmin(u, one) + p.hinge[2] * vmin(vmax(v, zero), one);
  }
  auto place = table_place<N, A>(reading, scale, p.weight_length);
  vec<A, N> lower = gather<N>(p.weight, place.lower), upper = gather<N>(p.weight, place.upper);
  return lower + place.fraction * (upper - lower);
}

// One frame's reading of N elements: g, its slope per unit of a reading in [0, 1], w, and where g lies in the curve.
template <int N, class A>
struct FrameTerms {
  vec<A, N> response, slope, weight;
  TablePlace<N, A> place;
};

// `offset`: of each element's channel in the curve, or null.
template <class T, int N, class A>
HDROPS_HD FrameTerms<N, A> frame_terms(const MergeParams<A>& p, const A* curve, const int32_t* offset, vec<A, N> raw) {
  const vec<A, N> zero = splat<N>(A(0)), top = splat<N>(A(kMergeMax<T>));
  vec<A, N> reading = raw > zero ? raw : zero;  // a NaN becomes 0
  reading = reading < top ? reading : top;
  FrameTerms<N, A> terms;
  terms.weight = merge_weight<T, N>(p, reading);
  terms.weight = raw == raw ? terms.weight : zero;
  if (curve == nullptr) {
    vec<A, N> least = splat<N>(A(kSmallestResponse));
    terms.response = reading * A(1 / kMergeMax<T>);
    terms.slope = (reading > zero) & (reading < top) ? splat<N>(A(1)) : zero;
    terms.response = reading > zero ? terms.response : least;
  } else {
    terms.place = table_place<N, A>(reading, double(p.curve_length - 1) / kMergeMax<T>, p.curve_length);
    if (offset != nullptr) {
      vec<int32_t, N> shift = load<N>(offset);
      terms.place.lower += shift;
      terms.place.upper += shift;
    }
    vec<A, N> lower = gather<N>(curve, terms.place.lower), upper = gather<N>(curve, terms.place.upper);
    terms.response = lower + terms.place.fraction * (upper - lower);
    terms.slope = raw >= zero ? (upper - lower) * A(p.curve_length - 1) : zero;
  }
  return terms;
}

}  // namespace HDROPS_ISA
}  // namespace hdrops
