// Exposure merging of a block of elements, the part that forward and backward share. Compiled per instruction set.
//
// prepare() points at the block's readings, frame after frame in order of exposure; accumulate() sums w and
// w (ln g - ln t) over the frames, of 8-bit codes from a table (merge_codes_cpu.h), of other readings evaluated in
// vectors (merge_readings_cpu.h), with the same code for one lane and for many. Elements whose weights sum to nearly
// nothing are then estimated by fall_back(), in vectors too; where no frame is left to do so by, and in the backward
// pass, by resolve(), which takes one element and knows every rule: masks, NaN, clipping in every frame.
namespace hdrops {
namespace HDROPS_ISA {

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
