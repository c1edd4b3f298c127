// Exposure merging on CUDA (OP-10), what forward and backward share: how a reading is weighed, and the slow way through
// one element that knows every rule. The kernels are in merge_forward_cuda.cuh and merge_backward_cuda.cuh.
//
// The frames are summed in the order that the preparation has found (merge_prepare_cuda.cuh), the next kFramesInFlight
// of them on their way from memory meanwhile. In two cases an element is taken the slow way, one frame after the other
// in order of exposure and reading (next_frame): where frames have equal exposures, since the sum must not depend on
// the order they were given in, and where the weights sum to nearly nothing.
#pragma once
#include "crf/merge_prepare_cuda.cuh"

namespace hdrops {

constexpr int kFramesInFlight = 3;
constexpr int64_t kMergeTableBytes = 48 << 10;  // of tables in shared memory, else they are read through the cache

HDROPS_HD float log_of(float x) { return logf(x); }
HDROPS_HD double log_of(double x) { return log(x); }
HDROPS_HD float exp_of(float x) { return expf(x); }
HDROPS_HD double exp_of(double x) { return exp(x); }

// The entry at or below a reading in a table, and how far it is to the next, in [0, 1].
template <class A>
struct TableEntry {
  int lower;
  A fraction;
};

// Where reading * scale lies in a table whose last entry is `last`. Both scale and product are kept to twice the digits
// of A, as on the CPU: in a long table the rounded product would be off by much of an entry, or name a neighbour.
template <class A>
__device__ __forceinline__ TableEntry<A> table_entry(A reading, double scale, int last) {
  const A rounded = A(scale), rest = A(scale - double(rounded));
  const int at = int(reading * rounded), near = at < last ? at : last;
  const A beyond = A(fma(reading, rounded, A(-near))) + reading * rest;
  const int step = int(beyond + A(1)) - 1;  // -1, 0 or 1: beyond lies in (-1, 2)
  return {near + step, beyond - A(step)};
}

// One frame's reading: w, g, its slope per unit of a reading in [0, 1], ln g, and where g lies in the curve.
template <class A>
struct ReadingTerms {
  A weight, response, slope, log_response, fraction;
  int lower;
};

// The tables of a stream's channels, in shared memory where they fit.
template <class T, class A>
struct MergeTables {
  static constexpr bool kCodes = sizeof(T) == 1;
  static constexpr A kTop = A(kMergeMax<T>);

  const MergeParams<A>& p;
  const Vector<A, 2>* codes = nullptr;
  const A* curve = nullptr;
  const A* weight = nullptr;
  A hinge[3];       // of a weight table of at most 3 entries: its first value and its two rises
  int channel = 0;  // between the tables of a stream's channels

  // The curve's tables that a stream has.
  __device__ static int64_t curves(const MergeParams<A>& p, int64_t stride_c) {
    return p.interleaved && stride_c != 0 ? p.channels : 1;
  }

  template <class Entry>
  __device__ static const Entry* shared_copy(const Entry* table, int64_t count, Entry* shared) {
    for (int i = int(threadIdx.x); i < int(count); i += int(blockDim.x)) shared[i] = table[i];
    return shared;
  }

  // `shared`: kMergeTableBytes at most of it are used, all threads of the block together.
  __device__ MergeTables(const MergeLaunch<A>& merge, int64_t image, int64_t plane, char* shared) : p(merge.p) {
    if constexpr (kCodes) {
      codes = merge.code_table + (image * merge.code_stride_n + plane * merge.code_stride_c) * kCodes8;
      channel = int(merge.code_stride_c * kCodes8);
      const int64_t count = curves(p, merge.code_stride_c) * kCodes8;
      if (count * int64_t(sizeof(Vector<A, 2>)) <= kMergeTableBytes) {
        codes = shared_copy(codes, count, reinterpret_cast<Vector<A, 2>*>(shared));
      }
    } else {
      A* free = reinterpret_cast<A*>(shared);
      int64_t room = kMergeTableBytes / int64_t(sizeof(A));
      weight = p.weight;
      hinge[0] = weight[0];
      hinge[1] = p.weight_length > 1 ? weight[1] - weight[0] : A(0);
      hinge[2] = p.weight_length > 2 ? weight[2] - weight[1] : A(0);
      if (p.weight_length > 3 && p.weight_length <= room) {
        weight = shared_copy(weight, p.weight_length, free);
        free += p.weight_length;
        room -= p.weight_length;
      }
      if (p.curve != nullptr) {
        curve = p.curve + image * p.curve_stride_n + plane * p.curve_stride_c;
        channel = int(p.curve_stride_c);
        const int64_t count = curves(p, p.curve_stride_c) * p.curve_length;
        if (count <= room) curve = shared_copy(curve, count, free);
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ A weight_of(A reading) const {
    const double scale = double(p.weight_length - 1) / kMergeMax<T>;
    if (p.weight_length <= 3) {
      const A position = reading * A(scale);
      const A beyond = position - A(1);
      return hinge[0] + hinge[1] * (position < A(1) ? position : A(1)) +
             hinge[2] * (beyond > A(0) ? (beyond < A(1) ? beyond : A(1)) : A(0));
    }
    const int last = int(p.weight_length) - 1;
    const TableEntry<A> place = table_entry(reading, scale, last);
    const int upper = place.lower < last ? place.lower + 1 : last;
    return weight[place.lower] + place.fraction * (weight[upper] - weight[place.lower]);
  }

  // Of a reading as it is stored, in the channel numbered `c` of the stream.
  __device__ __forceinline__ ReadingTerms<A> terms(T stored, int c) const {
    ReadingTerms<A> terms{};
    if constexpr (kCodes) {
      const Vector<A, 2> pair = codes[c * channel + stored];
      terms.weight = pair.value[0];
      terms.log_response = pair.value[1];
      terms.lower = stored;
    } else {
      const A raw = reading(stored), above = raw > A(0) ? raw : A(0), value = above < kTop ? above : kTop;
      terms.weight = raw == raw ? weight_of(value) : A(0);
      if (curve == nullptr) {
        terms.response = value > A(0) ? value * A(1 / kMergeMax<T>) : A(kSmallestResponse);
        terms.slope = value > A(0) && value < kTop ? A(1) : A(0);
      } else {
        const int last = int(p.curve_length) - 1;
        const TableEntry<A> place = table_entry(value, double(p.curve_length - 1) / kMergeMax<T>, last);
        terms.lower = place.lower;
        terms.fraction = place.fraction;
        const A* segment = curve + int64_t(c) * channel + terms.lower;
        const A low = positive_response(segment[0]);
        const A high = terms.lower < last ? positive_response(segment[1]) : low;
        terms.response = low + terms.fraction * (high - low);
        terms.slope = raw >= A(0) ? (high - low) * A(p.curve_length - 1) : A(0);
      }
      terms.log_response = log_of(terms.response);
    }
    return terms;
  }

  __device__ __forceinline__ static A reading(T stored) {
    if constexpr (kMergeMax<T> > 1) {
      return A(stored);
    } else {
      return load_as(stored);
    }
  }
};

// What lies contiguous in the output and has one set of tables: a plane, or an image of interleaved pixels.
template <class T, class A>
struct MergeStream {
  const MergeParams<A>& p;
  int64_t image, plane;
  const T* base;  // the stream's first element in frame 0
  const int32_t* order;
  const A* times;  // ln t, increasing
  const char* mask;
  bool tied, invalid;

  __device__ MergeStream(const MergeLaunch<A>& merge, int64_t index) : p(merge.p) {
    image = p.interleaved ? index : index / p.channels;
    plane = p.interleaved ? 0 : index % p.channels;
    base = static_cast<const T*>(p.stack) + image * p.stack_stride_n + plane * p.pixels;
    order = p.order + image * p.exposure_stride_n;
    times = p.log_exposures + image * p.exposure_stride_n;
    const int flags = merge.flags[p.exposure_stride_n != 0 ? image : 0];
    tied = (flags & kTied) != 0;
    invalid = (flags & kInvalid) != 0;
  }

  __device__ __forceinline__ const T* frame(int64_t j) const { return base + order[j] * p.stack_stride_p; }

  // Of frame j at a pixel, by the mask.
  __device__ __forceinline__ A share(int64_t j, int64_t pixel) const {
    if (p.mask_kind == MergeMask::none) return A(1);
    const int64_t at = image * p.mask_stride_n + order[j] * p.pixels + pixel;
    return p.mask_kind == MergeMask::boolean ? share_of_value<A>(static_cast<const uint8_t*>(p.mask)[at])
                                             : share_of_value<A>(static_cast<const A*>(p.mask)[at]);
  }
};

// One element of a stream.
struct MergePlace {
  int64_t index, pixel;
  int channel;
};

template <class A>
__device__ __forceinline__ MergePlace merge_place(const MergeParams<A>& p, int64_t index) {
  if (!p.interleaved) return {index, index, 0};
  return {index, index / p.channels, int(index % p.channels)};
}

template <class A>
__device__ __forceinline__ MergePlace next_place(const MergeParams<A>& p, MergePlace place) {
  ++place.index;
  if (!p.interleaved) return {place.index, place.index, 0};
  if (++place.channel == p.channels) place.channel = 0, ++place.pixel;
  return place;
}

// One element taken the slow way, through all rules. Frames are named by their rank in order of exposure.
template <class T, class A>
struct SlowElement {
  MergeTables<T, A> tables;
  MergeStream<T, A> s;
  MergePlace at;

  __device__ A reading(int64_t j) const { return MergeTables<T, A>::reading(s.frame(j)[at.index]); }
  __device__ ReadingTerms<A> terms(int64_t j) const { return tables.terms(s.frame(j)[at.index], at.channel); }
  __device__ A share(int64_t j) const { return s.share(j, at.pixel); }

  // Whether frame j comes after frame k of the same exposure.
  __device__ bool after(int64_t j, int64_t k) const {
    const A a = reading(j), b = reading(k), share_a = share(j), share_b = share(k);
    return comes_after(a, b, share_a, share_b) || (!comes_after(b, a, share_b, share_a) && j > k);
  }

  // The first of the frames of one exposure that begin at `begin`, after frame `previous` if that is one of them; -1 if
  // there is none.
  __device__ int64_t first_tied(int64_t begin, int64_t previous) const {
    int64_t first = -1;
    for (int64_t j = begin; j < s.p.frames && s.times[j] == s.times[begin]; ++j) {
      if (previous >= 0 && !after(j, previous)) continue;
      if (first < 0 || after(first, j)) first = j;
    }
    return first;
  }

  // The frame after `previous` (the first for -1) by exposure, equal exposures by reading; `frames` after the last.
  __device__ int64_t next_frame(int64_t previous) const {
    if (!s.tied || s.invalid) return previous + 1;
    int64_t begin = previous < 0 ? 0 : previous;
    while (begin > 0 && s.times[begin - 1] == s.times[begin]) --begin;
    const int64_t next = first_tied(begin, previous);
    if (next >= 0) return next;
    int64_t end = begin + 1;
    while (end < s.p.frames && s.times[end] == s.times[begin]) ++end;
    return end < s.p.frames ? first_tied(end, -1) : end;
  }

  // Whether frame j counts: no NaN, and not masked unless the mask is to be ignored.
  __device__ bool counts(int64_t j, bool masked) const {
    const A value = reading(j);
    return value == value && (!masked || share(j) > 0);
  }
};

template <class A>
struct MergeSums {
  A weight, value;  // of w, and of w (ln g - ln t)
};

template <class A>
__device__ __forceinline__ void add_terms(MergeSums<A>& sums, A weight, A log_response, A time) {
  sums.weight += weight;
  if (weight != A(0)) sums.value += weight * (log_response - time);  // what has no weight may be infinite
}

template <class T, class A>
__device__ MergeSums<A> slow_sums(const SlowElement<T, A>& e) {
  MergeSums<A> sums{A(0), A(0)};
  for (int64_t j = e.next_frame(-1); j < e.s.p.frames; j = e.next_frame(j)) {
    const auto terms = e.terms(j);
    add_terms(sums, terms.weight * e.share(j), terms.log_response, e.s.times[j]);
  }
  return sums;
}

// What an element is merged to, and how its frames share in it: by their weights over `total`, or one frame alone.
template <class A>
struct MergeResult {
  A log_radiance, total;
  int64_t chosen;  // the frame taken alone, or -1
  bool masked;     // weights times shares
};

// An element of nearly no weight: what is NaN or masked is left out; if that leaves none, the mask is ignored.
template <class T, class A>
__device__ MergeResult<A> resolve(const SlowElement<T, A>& e) {
  const int64_t frames = e.s.p.frames;
  int64_t count = 0;
  bool masked = true;
  for (int pass = 0; pass < 2 && count == 0; ++pass) {
    masked = pass == 0;
    for (int64_t j = 0; j < frames; ++j) count += e.counts(j, masked);
  }
  if (count == 0) return {A(NAN), A(1), -1, true};
  MergeSums<A> sums{A(0), A(0)};
  int64_t first = -1, last = -1, seen = 0;
  bool bright = false;
  for (int64_t j = e.next_frame(-1); j < frames; j = e.next_frame(j)) {
    if (!e.counts(j, masked)) continue;
    const auto terms = e.terms(j);
    add_terms(sums, masked ? terms.weight * e.share(j) : terms.weight, terms.log_response, e.s.times[j]);
    if (first < 0) first = j;
    if (seen++ == (count - 1) / 2) bright = e.reading(j) > A(kMergeMax<T> / 2);
    last = j;
  }
  if (e.s.p.fallback && sums.weight <= A(kNoWeight)) {
    const int64_t chosen = bright ? first : last;
    return {e.terms(chosen).log_response - e.s.times[chosen], A(1), chosen, masked};
  }
  const A total = sums.weight + A(kMergeEpsilon);
  return {sums.value / total, total, -1, masked};
}

// Whether an element's sums are all it needs.
template <class T, class A>
__device__ __forceinline__ bool is_plain(const MergeStream<T, A>& s, MergeSums<A> sums) {
  return !s.tied && !s.invalid && sums.weight > A(kNoWeight);
}

template <class A>
__device__ __forceinline__ A log_radiance_of(MergeSums<A> sums) {
  return sums.value / (sums.weight + A(kMergeEpsilon));
}

// An element that is not plain.
template <class T, class A>
__device__ __noinline__ MergeResult<A> slow_result(SlowElement<T, A> e) {
  if (e.s.invalid) return {A(NAN), A(1), -1, true};
  if (e.s.tied) {
    const MergeSums<A> sums = slow_sums(e);
    if (sums.weight > A(kNoWeight)) return {log_radiance_of(sums), sums.weight + A(kMergeEpsilon), -1, true};
  }
  return resolve(e);
}

// exp, held to the normal numbers of the type it is computed in.
__device__ __forceinline__ float radiance_of(float log_radiance) {
  return exp_of(log_radiance < -87.0f ? -87.0f : log_radiance > 88.0f ? 88.0f : log_radiance);
}
__device__ __forceinline__ double radiance_of(double log_radiance) {
  return exp_of(log_radiance < -708.0 ? -708.0 : log_radiance > 709.0 ? 709.0 : log_radiance);
}

// The V elements of a thread, of which `count` exist.
template <class T, class A, int V>
struct MergeVector {
  MergePlace first;
  int count;
  MergeSums<A> sums[V];

  __device__ __forceinline__ Vector<T, V> load(const MergeStream<T, A>& s, int64_t j) const {
    const T* from = s.frame(j) + first.index;
    if (count == V) return load_elements<V>(from, is_aligned<T, V>(from));
    Vector<T, V> loaded{};
    for (int k = 0; k < V; ++k) {
      if (k < count) loaded.value[k] = from[k];
    }
    return loaded;
  }

  // The place of element k.
  __device__ __forceinline__ MergePlace place(const MergeParams<A>& p, int k) const {
    return merge_place(p, first.index + k);
  }

  // Which elements are not plain, a bit each.
  __device__ __forceinline__ unsigned slow(const MergeStream<T, A>& s) const {
    unsigned bits = 0;
#pragma unroll
    for (int k = 0; k < V; ++k) bits |= k < count && !is_plain(s, sums[k]) ? 1u << k : 0;
    return bits;
  }

  // Sums of w and w (ln g - ln t), frame after frame.
  __device__ __forceinline__ void accumulate(const MergeTables<T, A>& tables, const MergeStream<T, A>& s) {
#pragma unroll
    for (int k = 0; k < V; ++k) sums[k] = {A(0), A(0)};
    Vector<T, V> ahead[kFramesInFlight];
#pragma unroll
    for (int f = 0; f < kFramesInFlight; ++f) ahead[f] = f < s.p.frames ? load(s, f) : Vector<T, V>{};
#pragma unroll 1
    for (int64_t j = 0; j < s.p.frames; ++j) {
      const Vector<T, V> stored = ahead[0];
#pragma unroll
      for (int f = 0; f + 1 < kFramesInFlight; ++f) ahead[f] = ahead[f + 1];
      if (j + kFramesInFlight < s.p.frames) ahead[kFramesInFlight - 1] = load(s, j + kFramesInFlight);
      add_frame(tables, s, j, stored);
    }
  }

  __device__ __forceinline__ void add_frame(const MergeTables<T, A>& tables, const MergeStream<T, A>& s, int64_t j,
                                            const Vector<T, V>& stored) {
    const A time = s.times[j];
    MergePlace at = first;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const auto terms = tables.terms(stored.value[k], at.channel);
      const A share = k < count ? s.share(j, at.pixel) : A(0);
      add_terms(sums[k], terms.weight * share, terms.log_response, time);
      at = next_place(s.p, at);
    }
  }
};

// Elements of the output, or the stack, in 16 bytes.
template <class T, class Out>
constexpr int kMergeVector = kRunVector<T, Out>;

}  // namespace hdrops
