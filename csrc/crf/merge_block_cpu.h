// Exposure merging of a block of elements, the part that forward and backward share. Compiled per instruction set.
//
// prepare() points at the block's readings, frame after frame in order of exposure; accumulate() sums w and
// w (ln g - ln t) over the frames, of 8-bit codes from a table, of other readings evaluated in vectors, with the same
// code for one lane and for many. Elements whose weights sum to nearly nothing are then estimated by fall_back(), in
// vectors too; where no frame is left to do so by, and in the backward pass, by resolve(), which takes one element and
// knows every rule: masks, NaN, clipping in every frame.
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

// Copies the frames [first, last) of one exposure and sorts each element's readings, so that the sum over the frames
// does not depend on the order they were given in.
template <class T, class A>
void order_tied(MergeWorkspace<T, A>& ws, int64_t first, int64_t last, int64_t block, int64_t count) {
  const bool shared = ws.share[first] != nullptr;
  for (int64_t j = first; j < last; ++j) {
    T* reading = ws.tied_reading + j * block;
    A* share = ws.tied_share + j * block;
    __builtin_memcpy(reading, ws.row[j], size_t(count) * sizeof(T));
    if (shared) __builtin_memcpy(share, ws.share[j], size_t(count) * sizeof(A));
    ws.ordered_row[j] = reading;
    if (shared) ws.ordered_share[j] = share;
  }
  for (int64_t end = last - 1; end > first; --end) {
    for (int64_t j = first; j < end; ++j) {
      T *low = ws.tied_reading + j * block, *high = low + block;
      A *low_share = ws.tied_share + j * block, *high_share = low_share + block;
      for (int64_t i = 0; i < count; ++i) {
        A a = reading_of<A>(low[i]), b = reading_of<A>(high[i]);
        bool swap = comes_after<A>(a, b, shared ? low_share[i] : A(0), shared ? high_share[i] : A(0));
        T held = low[i];
        low[i] = swap ? high[i] : held;
        high[i] = swap ? held : high[i];
        if (shared) {
          A part = low_share[i];
          low_share[i] = swap ? high_share[i] : part;
          high_share[i] = swap ? part : high_share[i];
        }
      }
    }
  }
}

// Each pixel's share as often as it has channels; kRepeat where the compiler shall know how often.
template <int kRepeat, class M, class A>
void repeat_shares(const M* mask, int64_t count, int64_t channels, A* share) {
  const int64_t repeat = kRepeat > 0 ? kRepeat : channels;
  for (int64_t i = 0; i < count; i += repeat, ++mask) {
    const A value = share_of_value<A>(*mask);
    for (int64_t c = 0; c < repeat; ++c) share[i + c] = value;
  }
}

template <class M, class A>
void expand_mask(const M* mask, int64_t count, int64_t repeat, A* share) {
  if (repeat == 1) return repeat_shares<1>(mask, count, repeat, share);
  if (repeat == 3) return repeat_shares<3>(mask, count, repeat, share);
  repeat_shares<0>(mask, count, repeat, share);
}

// A frame's mask, one share an element.
template <class T, class A>
void frame_shares(const MergeParams<A>& p, const MergeStream<T, A>& s, int64_t frame, int64_t begin, int64_t count,
                  A* share) {
  const int64_t repeat = p.interleaved ? p.channels : 1;
  const int64_t at = s.image * p.mask_stride_n + frame * p.pixels + begin / repeat;
  if (p.mask_kind == MergeMask::boolean) {
    expand_mask(static_cast<const uint8_t*>(p.mask) + at, count, repeat, share);
  } else {
    expand_mask(static_cast<const A*>(p.mask) + at, count, repeat, share);
  }
}

// Points the workspace at `count` elements from `begin` of a stream.
template <class T, class A>
void prepare(const MergeParams<A>& p, const MergeStream<T, A>& s, int64_t begin, int64_t block, int64_t count,
             MergeWorkspace<T, A>& ws) {
  for (int64_t j = 0; j < p.frames; ++j) {
    ws.row[j] = ws.ordered_row[j] = s.base + s.order[j] * p.stack_stride_p + begin;
    ws.share[j] = ws.ordered_share[j] = nullptr;
    if (p.mask_kind != MergeMask::none) {
      A* share = ws.share_block + j * block;
      frame_shares(p, s, s.order[j], begin, count, share);
      ws.share[j] = ws.ordered_share[j] = share;
    }
  }
  if (!p.tied) return;
  for (int64_t first = 0; first < p.frames;) {
    int64_t last = first + 1;
    while (last < p.frames && s.log_exposures[last] == s.log_exposures[first]) ++last;
    if (last - first > 1) order_tied(ws, first, last, block, count);
    first = last;
  }
}

// The offsets of the channels of an interleaved block.
template <class T, class A>
void prepare_offsets(const MergeParams<A>& p, int64_t block, MergeWorkspace<T, A>& ws) {
  for (int64_t i = 0; i < block; ++i) {
    ws.curve_offset[i] = int32_t(i % p.channels * p.curve_stride_c);
    ws.code_offset[i] = int32_t(p.table_stride_c != 0 ? i % p.channels * kCodes8 : 0);
  }
}

// ln g of the codes 0 and 255, element by element of a block.
template <class T, class A>
void prepare_ends(const MergeParams<A>& p, const MergeStream<T, A>& s, int64_t block, MergeWorkspace<T, A>& ws) {
  if (s.log_curve == nullptr) return;
  const bool offsets = p.interleaved && p.log_curve_stride_c != 0;
  for (int64_t i = 0; i < block; ++i) {
    const A* log_curve = s.log_curve + (offsets ? ws.code_offset[i] : 0);
    ws.darkest[i] = log_curve[0];
    ws.brightest[i] = log_curve[kCodes8 - 1];
  }
}

// Sums of N elements from i, readings evaluated as vectors.
template <int N, class T, class A>
HDROPS_HD void accumulate_readings(const MergeParams<A>& p, const MergeStream<T, A>& s, MergeWorkspace<T, A>& ws,
                                   int64_t i) {
  const int32_t* offset = p.interleaved && p.curve_stride_c != 0 ? ws.curve_offset + i : nullptr;
  vec<A, N> weights = splat<N>(A(0)), values = weights;
  for (int64_t j = 0; j < p.frames; ++j) {
    auto terms = frame_terms<T, N>(p, s.curve, offset, load_reading<N, A>(ws.ordered_row[j] + i));
    if (ws.ordered_share[j] != nullptr) terms.weight *= load<N>(ws.ordered_share[j] + i);
    weights += terms.weight;
    values += terms.weight * (vlog<N>(terms.response) - s.log_exposures[j]);
  }
  store<N>(ws.weight_sum + i, weights);
  store<N>(ws.value_sum + i, values);
}

// Which table a code is read in: one for all; those of three channels in turn, from a channel known to the compiler; or
// as code_offset says.
constexpr int kOneTable = -1, kAnyChannels = 3;

// The terms of code z, the k-th from element i.
template <int kChannel, class A>
HDROPS_HD const A* entry_of_code(const MergeParams<A>& p, const MergeStream<uint8_t, A>& s,
                                 const MergeWorkspace<uint8_t, A>& ws, int64_t i, int k, uint64_t z) {
  const A* entry = s.table + kCodeTerms * z;
  if constexpr (kChannel == kAnyChannels) {
    entry += kCodeTerms * ws.code_offset[i + k];
  } else if constexpr (kChannel != kOneTable) {
    entry += (kChannel + k) % 3 * (kCodeTerms * kCodes8);
  }
  return entry;
}

// Sums of two codes: w and w ln g of the first, then of the second; and those times ln t.
template <class A>
struct PairSums {
  vec<A, 4> terms, timed;
};

template <class A>
HDROPS_HD vec<A, 4> load_two_entries(const A* first, const A* second) {
#if defined(__x86_64__)
  if constexpr (sizeof(A) == 4) {  // the second load fills the upper half, which GCC does not find by itself
    const __m128 low = _mm_castpd_ps(_mm_load_sd(reinterpret_cast<const double*>(first)));
    return bit_cast_vec<vec<A, 4>>(_mm_loadh_pi(low, reinterpret_cast<const __m64*>(second)));
  }
#endif
  return __builtin_shufflevector(load<kCodeTerms>(first), load<kCodeTerms>(second), 0, 1, 2, 3);
}

// Adds a frame's terms of kGroup 8-bit codes from i. Four codes are loaded as one word, since it is loads that bound
// this.
template <int kGroup, int kChannel, bool kShares, class A>
HDROPS_HD void add_frame_of_codes(const MergeParams<A>& p, const MergeStream<uint8_t, A>& s,
                                  const MergeWorkspace<uint8_t, A>& ws, int64_t j, int64_t i,
                                  PairSums<A> (&sums)[kGroup / 2]) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the first code is a word's lowest byte");
  const uint8_t* row = ws.ordered_row[j] + i;
  const A log_exposure = s.log_exposures[j];
  for (int k = 0; k < kGroup; k += 2) {
    uint32_t four;
    __builtin_memcpy(&four, row + k / 4 * 4, 4);
    const uint64_t word = uint64_t(four) >> k % 4 * 8;
    vec<A, 4> terms = load_two_entries(entry_of_code<kChannel>(p, s, ws, i, k, word & 255),
                                       entry_of_code<kChannel>(p, s, ws, i, k + 1, word >> 8 & 255));
    if constexpr (kShares) {
      const A* share = ws.ordered_share[j] + i + k;
      terms *= vec<A, 4>{share[0], share[0], share[1], share[1]};
    }
    sums[k / 2].terms += terms;
    sums[k / 2].timed += terms * log_exposure;
  }
}

// Codes that are summed side by side.
template <class A>
#if defined(HDROPS_HAVE_AVX512)
constexpr int kCodeGroup = sizeof(A) == 4 ? 16 : 8;
#else
constexpr int kCodeGroup = 8;
#endif

#if defined(HDROPS_HAVE_AVX512)
// The places in the table of what entry_of_code() finds for code 0, of eight codes from i + first.
template <int kChannel>
HDROPS_HD vec<int32_t, 8> places_of_zero(const MergeWorkspace<uint8_t, float>& ws, int64_t i, int first) {
  if constexpr (kChannel == kAnyChannels) return load<8>(ws.code_offset + i + first);
  vec<int32_t, 8> place{};
  if constexpr (kChannel != kOneTable) {
    for (int k = 0; k < 8; ++k) place[k] = (kChannel + first + k) % 3 * kCodes8;
  }
  return place;
}

// Of sixteen pairs, the first of each and the second.
HDROPS_HD vec<float, 16> first_terms(vec<float, 16> low, vec<float, 16> high) {
  return __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
HDROPS_HD vec<float, 16> second_terms(vec<float, 16> low, vec<float, 16> high) {
  return __builtin_shufflevector(low, high, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

// accumulate_group() of floats: one gather fetches both terms of eight codes, as eight doubles.
template <int kFrames, int kChannel, bool kShares>
HDROPS_HD void gather_group(const MergeParams<float>& p, const MergeStream<uint8_t, float>& s,
                            MergeWorkspace<uint8_t, float>& ws, int64_t i) {
  const vec<int32_t, 8> zero[2] = {places_of_zero<kChannel>(ws, i, 0), places_of_zero<kChannel>(ws, i, 8)};
  vec<float, 16> terms[2] = {}, timed[2] = {};
  const int64_t frames = kFrames > 0 ? kFrames : p.frames;
#pragma GCC unroll 8
  for (int64_t j = 0; j < frames; ++j) {
    const uint8_t* row = ws.ordered_row[j] + i;
    for (int half = 0; half < 2; ++half) {
      const auto place = bit_cast_vec<__m256i>(load_codes<8>(row + 8 * half) + zero[half]);
      auto entries = bit_cast_vec<vec<float, 16>>(
          _mm512_mask_i32gather_pd(_mm512_setzero_pd(), __mmask8(0xff), place, s.table, kCodeTerms * sizeof(float)));
      if constexpr (kShares) {
        const vec<float, 8> share = load<8>(ws.ordered_share[j] + i + 8 * half);
        entries *= __builtin_shufflevector(share, share, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
      }
      terms[half] += entries;
      timed[half] += entries * s.log_exposures[j];
    }
  }
  store<16>(ws.weight_sum + i, first_terms(terms[0], terms[1]));
  store<16>(ws.value_sum + i, second_terms(terms[0], terms[1]) - first_terms(timed[0], timed[1]));
}
#endif

// Sums of kCodeGroup codes from i, over the frames; of a number known to the compiler (kFrames) unrolled, else 0.
template <int kFrames, int kChannel, bool kShares, class A>
HDROPS_HD void accumulate_group(const MergeParams<A>& p, const MergeStream<uint8_t, A>& s,
                                MergeWorkspace<uint8_t, A>& ws, int64_t i) {
#if defined(HDROPS_HAVE_AVX512)
  if constexpr (sizeof(A) == 4) return gather_group<kFrames, kChannel, kShares>(p, s, ws, i);
#endif
  PairSums<A> sums[4] = {};
  if constexpr (kFrames > 0) {
#pragma GCC unroll 8
    for (int64_t j = 0; j < kFrames; ++j) add_frame_of_codes<8, kChannel, kShares>(p, s, ws, j, i, sums);
  } else {
    for (int64_t j = 0; j < p.frames; ++j) add_frame_of_codes<8, kChannel, kShares>(p, s, ws, j, i, sums);
  }
  auto terms02 = join<A, 4>(sums[0].terms, sums[2].terms), terms13 = join<A, 4>(sums[1].terms, sums[3].terms);
  auto timed02 = join<A, 4>(sums[0].timed, sums[2].timed), timed13 = join<A, 4>(sums[1].timed, sums[3].timed);
  store<8>(ws.weight_sum + i, __builtin_shufflevector(terms02, terms13, 0, 2, 8, 10, 4, 6, 12, 14));
  store<8>(ws.value_sum + i, __builtin_shufflevector(terms02, terms13, 1, 3, 9, 11, 5, 7, 13, 15) -
                                 __builtin_shufflevector(timed02, timed13, 0, 2, 8, 10, 4, 6, 12, 14));
}

// The same of one code.
template <int kChannel, bool kShares, class A>
HDROPS_HD void accumulate_one_code(const MergeParams<A>& p, const MergeStream<uint8_t, A>& s,
                                   MergeWorkspace<uint8_t, A>& ws, int64_t i) {
  A weight = 0, value = 0, timed = 0;
  for (int64_t j = 0; j < p.frames; ++j) {
    auto terms = load<kCodeTerms>(entry_of_code<kChannel>(p, s, ws, i, 0, ws.ordered_row[j][i]));
    if constexpr (kShares) terms *= ws.ordered_share[j][i];
    weight += terms[0];
    value += terms[1];
    timed += terms[0] * s.log_exposures[j];
  }
  ws.weight_sum[i] = weight;
  ws.value_sum[i] = value - timed;
}

template <int kFrames, bool kShares, class A>
void accumulate_codes_of(const MergeParams<A>& p, const MergeStream<uint8_t, A>& s, MergeWorkspace<uint8_t, A>& ws,
                         int64_t count) {
  constexpr int kGroup = kCodeGroup<A>;
  int64_t i = 0;
  if (!p.interleaved || p.table_stride_c == 0) {
    for (; i + kGroup <= count; i += kGroup) accumulate_group<kFrames, kOneTable, kShares>(p, s, ws, i);
    for (; i < count; ++i) accumulate_one_code<kOneTable, kShares>(p, s, ws, i);
    return;
  }
  if (p.channels == 3) {
    for (; i + 3 * kGroup <= count; i += 3 * kGroup) {
      accumulate_group<kFrames, 0, kShares>(p, s, ws, i);
      accumulate_group<kFrames, kGroup % 3, kShares>(p, s, ws, i + kGroup);
      accumulate_group<kFrames, 2 * kGroup % 3, kShares>(p, s, ws, i + 2 * kGroup);
    }
  }
  for (; i + kGroup <= count; i += kGroup) accumulate_group<0, kAnyChannels, kShares>(p, s, ws, i);
  for (; i < count; ++i) accumulate_one_code<kAnyChannels, kShares>(p, s, ws, i);
}

template <bool kShares, class A>
void accumulate_codes(const MergeParams<A>& p, const MergeStream<uint8_t, A>& s, MergeWorkspace<uint8_t, A>& ws,
                      int64_t count) {
  if (p.frames == 3) return accumulate_codes_of<3, kShares>(p, s, ws, count);
  if (p.frames == 4) return accumulate_codes_of<4, kShares>(p, s, ws, count);
  if (p.frames == 5) return accumulate_codes_of<5, kShares>(p, s, ws, count);
  accumulate_codes_of<0, kShares>(p, s, ws, count);
}

// Sums of a prepared block.
template <class T, class A>
void accumulate(const MergeParams<A>& p, const MergeStream<T, A>& s, MergeWorkspace<T, A>& ws, int64_t count) {
  if constexpr (sizeof(T) == 1) {
    p.mask_kind != MergeMask::none ? accumulate_codes<true>(p, s, ws, count) : accumulate_codes<false>(p, s, ws, count);
  } else {
    constexpr int N = kLanes<A>;
    int64_t i = 0;
    for (; i + N <= count; i += N) accumulate_readings<N>(p, s, ws, i);
    for (; i < count; ++i) accumulate_readings<1>(p, s, ws, i);
  }
}

// w and ln g - ln t of element i in the frame of rank j.
template <class T, class A>
void terms_of_one(const MergeParams<A>& p, const MergeStream<T, A>& s, MergeWorkspace<T, A>& ws, int64_t j, int64_t i,
                  A& weight, A& value) {
  const int64_t channel = p.interleaved ? i % p.channels : 0;
  if constexpr (sizeof(T) == 1) {
    weight = p.code_weight[ws.row[j][i]];
    value = s.log_curve[channel * p.log_curve_stride_c + ws.row[j][i]] - s.log_exposures[j];
  } else {
    const A* curve = s.curve == nullptr ? nullptr : s.curve + channel * p.curve_stride_c;
    auto terms = frame_terms<T, 1>(p, curve, nullptr, load_reading<1, A>(ws.row[j] + i));
    weight = terms.weight[0];
    value = vlog<1>(terms.response)[0] - s.log_exposures[j];
  }
}

template <class T, class A>
HDROPS_HD A share_of(const MergeWorkspace<T, A>& ws, int64_t j, int64_t i) {
  return ws.share[j] != nullptr ? ws.share[j][i] : A(1);
}

// ln E of element i by all the rules, and in ws.fraction how much of each frame's ln g - ln t it is made of.
template <class T, class A>
A resolve(const MergeParams<A>& p, const MergeStream<T, A>& s, MergeWorkspace<T, A>& ws, int64_t i) {
  // By exposure, equal exposures by reading, what is NaN or masked left out; if that leaves none, the mask is ignored.
  int32_t* rank = ws.rank;
  int64_t count = 0;
  bool masked = true;
  for (int pass = 0; pass < 2 && count == 0; ++pass) {
    masked = pass == 0;
    for (int64_t j = 0; j < p.frames; ++j) {
      A reading = reading_of<A>(ws.row[j][i]), share = share_of(ws, j, i);
      if (reading != reading || (masked && !(share > 0))) continue;
      int64_t at = count++;
      for (; at > 0; --at) {
        int32_t before = rank[at - 1];
        if (s.log_exposures[before] != s.log_exposures[j]) break;
        if (!comes_after<A>(reading_of<A>(ws.row[before][i]), reading, share_of(ws, before, i), share)) break;
        rank[at] = before;
      }
      rank[at] = int32_t(j);
    }
  }
  for (int64_t j = 0; j < p.frames; ++j) ws.fraction[j] = 0;
  if (count == 0) return A(__builtin_nan(""));

  A total = 0, sum = 0;
  for (int64_t k = 0; k < count; ++k) {
    A weight, value;
    terms_of_one(p, s, ws, rank[k], i, weight, value);
    if (masked) weight *= share_of(ws, rank[k], i);
    ws.fraction[rank[k]] = weight;
    total += weight;
    if (weight != 0) sum += weight * value;
  }
  if (p.fallback && total <= A(kNoWeight)) {
    bool bright = reading_of<A>(ws.row[rank[(count - 1) / 2]][i]) > A(kMergeMax<T> / 2);
    int32_t chosen = bright ? rank[0] : rank[count - 1];
    for (int64_t j = 0; j < p.frames; ++j) ws.fraction[j] = j == chosen ? A(1) : A(0);
    A weight, value;
    terms_of_one(p, s, ws, chosen, i, weight, value);
    return value;
  }
  total += A(kMergeEpsilon);
  for (int64_t j = 0; j < p.frames; ++j) ws.fraction[j] /= total;
  return sum / total;
}

// ln E of a block from its sums, but for elements of nearly no weight; returns whether there are any.
template <class A>
bool log_radiance_of_sums(const A* weight_sum, const A* value_sum, A* log_radiance, int64_t count) {
  constexpr int N = kLanes<A>;
  int64_t i = 0;
  vec<A, N> least = splat<N>(A(1));
  for (; i + N <= count; i += N) {
    vec<A, N> total = load<N>(weight_sum + i);
    least = vmin(total, least);
    store<N>(log_radiance + i, load<N>(value_sum + i) / (total + A(kMergeEpsilon)));
  }
  A smallest = least[0];
  for (int lane = 1; lane < N; ++lane) smallest = smallest < least[lane] ? smallest : least[lane];
  for (; i < count; ++i) {
    smallest = smallest < weight_sum[i] ? smallest : weight_sum[i];
    log_radiance[i] = value_sum[i] / (weight_sum[i] + A(kMergeEpsilon));
  }
  return smallest <= A(kNoWeight);
}

// Of N elements: the frames that the fallback looks at, those that are NaN or masked left out.
template <int N, class A>
struct FallbackFrames {
  vec<A, N> count;  // of the frames that are left
  vec<A, N> reading, log_exposure;
};

template <int N, class T, class A>
HDROPS_HD vec<A, N> frame_reading(const MergeWorkspace<T, A>& ws, int64_t j, int64_t i) {
  return load_reading<N, A>(ws.ordered_row[j] + i);
}

// 1 where a frame's reading is left to be used, else 0.
template <int N, class T, class A>
HDROPS_HD vec<A, N> usable(const MergeWorkspace<T, A>& ws, int64_t j, int64_t i, vec<A, N> reading) {
  const vec<A, N> zero = splat<N>(A(0)), one = splat<N>(A(1));
  vec<A, N> use = reading == reading ? one : zero;
  if (ws.ordered_share[j] != nullptr) use = load<N>(ws.ordered_share[j] + i) > zero ? use : zero;
  return use;
}

// The shortest frame's reading where the middle one is bright, else the longest's.
template <int N, class T, class A>
HDROPS_HD FallbackFrames<N, A> fallback_frames(const MergeParams<A>& p, const MergeStream<T, A>& s,
                                               const MergeWorkspace<T, A>& ws, int64_t i) {
  const vec<A, N> zero = splat<N>(A(0)), half = splat<N>(A(kMergeMax<T> / 2));
  if (kMergeMax<T> > 1 && p.mask_kind == MergeMask::none) {
    const int64_t last = p.frames - 1;
    auto bright = frame_reading<N>(ws, last / 2, i) > half;
    return {splat<N>(A(p.frames)), bright ? frame_reading<N>(ws, 0, i) : frame_reading<N>(ws, last, i),
            bright ? splat<N>(s.log_exposures[0]) : splat<N>(s.log_exposures[last])};
  }
  vec<A, N> count = zero;
  for (int64_t j = 0; j < p.frames; ++j) count += usable<N>(ws, j, i, frame_reading<N>(ws, j, i));
  vec<A, N> rank = zero, middle = zero, shortest = zero, longest = zero, short_time = zero, long_time = zero;
  for (int64_t j = 0; j < p.frames; ++j) {
    const vec<A, N> value = frame_reading<N>(ws, j, i), log_exposure = splat<N>(s.log_exposures[j]);
    const vec<A, N> use = usable<N>(ws, j, i, value);
    auto used = use > zero, first = used & (rank == zero);
    // Rank (count - 1) / 2, rounded down: the one for which 2 rank is count - 1 or count - 2.
    auto central = used & (rank + rank <= count - A(1)) & (rank + rank >= count - A(2));
    shortest = first ? value : shortest;
    short_time = first ? log_exposure : short_time;
    middle = central ? value : middle;
    longest = used ? value : longest;
    long_time = used ? log_exposure : long_time;
    rank += use;
  }
  auto bright = middle > half;
  return {count, bright ? shortest : longest, bright ? short_time : long_time};
}

// ln g of N readings that are numbers.
template <int N, class T, class A>
HDROPS_HD vec<A, N> log_response(const MergeParams<A>& p, const MergeStream<T, A>& s, const MergeWorkspace<T, A>& ws,
                                 int64_t i, vec<A, N> reading) {
  if constexpr (sizeof(T) == 1) {
    const bool offsets = p.interleaved && p.log_curve_stride_c != 0;
    vec<int32_t, N> code = __builtin_convertvector(reading, vec<int32_t, N>);
    if (offsets) code += load<N>(ws.code_offset + i);
    return gather<N>(s.log_curve, code);
  } else {
    const int32_t* offset = p.interleaved && p.curve_stride_c != 0 ? ws.curve_offset + i : nullptr;
    return vlog<N>(frame_terms<T, N>(p, s.curve, offset, reading).response);
  }
}

template <class V>
HDROPS_HD bool any_lane(V mask) {
  bool any = false;
  for (size_t lane = 0; lane < sizeof(mask) / sizeof(mask[0]); ++lane) any |= mask[lane] != 0;
  return any;
}

// ln E of those of N elements from i that have nearly no weight; returns whether each had a frame that is neither NaN
// nor masked. Those that had none are left as they are.
template <int N, class T, class A>
HDROPS_HD bool fall_back(const MergeParams<A>& p, const MergeStream<T, A>& s, MergeWorkspace<T, A>& ws, int64_t i) {
  auto lost = load<N>(ws.weight_sum + i) <= splat<N>(A(kNoWeight));
  if (!any_lane(lost)) return true;
  const FallbackFrames<N, A> frames = fallback_frames<N>(p, s, ws, i);
  const vec<A, N> estimate = log_response<N>(p, s, ws, i, frames.reading) - frames.log_exposure;
  auto found = frames.count > splat<N>(A(0));
  const vec<A, N> merged = load<N>(ws.log_radiance + i);
  store<N>(ws.log_radiance + i, lost & found ? estimate : merged);
  if (kMergeMax<T> > 1 && p.mask_kind == MergeMask::none) return true;
  return !any_lane(lost & ~found);
}

// ln E by resolve() of the elements [begin, end) that have nearly no weight.
template <class T, class A>
void resolve_each(const MergeParams<A>& p, const MergeStream<T, A>& s, MergeWorkspace<T, A>& ws, int64_t begin,
                  int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (ws.weight_sum[i] <= A(kNoWeight)) ws.log_radiance[i] = resolve(p, s, ws, i);
  }
}

// The fallback of N codes that no mask weighs, where an element of nearly no weight has no codes but 0 and 255.
template <int N, class A>
HDROPS_HD void fall_back_to_ends(const uint8_t* shortest, const uint8_t* middle, const uint8_t* longest, A short_time,
                                 A long_time, const MergeWorkspace<uint8_t, A>& ws, int64_t i) {
  const vec<A, N> half = splat<N>(A(kMergeMax<uint8_t> / 2));
  auto bright = load_reading<N, A>(middle + i) > half;
  const vec<A, N> code = bright ? load_reading<N, A>(shortest + i) : load_reading<N, A>(longest + i);
  const vec<A, N> log_response = code > half ? load<N>(ws.brightest + i) : load<N>(ws.darkest + i);
  const vec<A, N> estimate = log_response - (bright ? splat<N>(short_time) : splat<N>(long_time));
  const vec<A, N> merged = load<N>(ws.log_radiance + i);
  store<N>(ws.log_radiance + i, load<N>(ws.weight_sum + i) <= splat<N>(A(kNoWeight)) ? estimate : merged);
}

template <class A>
void fall_back_to_ends(const MergeParams<A>& p, const MergeStream<uint8_t, A>& s, MergeWorkspace<uint8_t, A>& ws,
                       int64_t count) {
  constexpr int N = kLanes<A>;
  const int64_t last = p.frames - 1;
  const uint8_t *shortest = ws.ordered_row[0], *middle = ws.ordered_row[last / 2], *longest = ws.ordered_row[last];
  const A short_time = s.log_exposures[0], long_time = s.log_exposures[last];
  int64_t i = 0;
  for (; i + N <= count; i += N) fall_back_to_ends<N, A>(shortest, middle, longest, short_time, long_time, ws, i);
  for (; i < count; ++i) fall_back_to_ends<1, A>(shortest, middle, longest, short_time, long_time, ws, i);
}

// ln E of a prepared block.
template <class T, class A>
void merge_block(const MergeParams<A>& p, const MergeStream<T, A>& s, MergeWorkspace<T, A>& ws, int64_t count) {
  constexpr int N = kLanes<A>;
  accumulate(p, s, ws, count);
  if (!log_radiance_of_sums(ws.weight_sum, ws.value_sum, ws.log_radiance, count)) return;
  if (!p.fallback) {
    if (kMergeMax<T> == 1 || p.mask_kind != MergeMask::none) resolve_each(p, s, ws, 0, count);
    return;
  }
  if constexpr (sizeof(T) == 1) {
    if (p.only_ends_clip && p.mask_kind == MergeMask::none) return fall_back_to_ends(p, s, ws, count);
  }
  int64_t i = 0;
  for (; i + N <= count; i += N) {
    if (!fall_back<N>(p, s, ws, i)) resolve_each(p, s, ws, i, i + N);
  }
  for (; i < count; ++i) {
    if (!fall_back<1>(p, s, ws, i)) resolve_each(p, s, ws, i, i + 1);
  }
}

}  // namespace HDROPS_ISA
}  // namespace hdrops
