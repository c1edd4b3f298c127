// crf_lookup on one instruction set: N pixels of a register at a time, the few before and after them one by one by the
// same code with N = 1. `Linear` says how a pixel meets its curve (common/lut.h); codes always index it.
#include "common/streaming.h"
#include "crf/lookup_vector.h"

namespace hdrops {
namespace HDROPS_ISA {

// Where pixels lie on their curve. A NaN lies at level 0.
template <int N, class A>
struct Position {
  vec<int32_t, N> index;
  vec<A, N> fraction;
};

template <bool Linear, int N, class A>
HDROPS_HD Position<N, A> locate(vec<A, N> x, A last) {
  auto clamped = vmin(vmax(x, splat<N>(A(0))), splat<N>(A(1)));
  auto position = clamped * last;
  if constexpr (Linear) {
    auto index = __builtin_convertvector(position, vec<int32_t, N>);
    return {index, multiply_subtract<N>(clamped, splat<N>(last), __builtin_convertvector(index, vec<A, N>))};
  } else {
    // Adding 1.5 * 2^(mantissa bits) leaves no room for a fraction: the addition rounds, ties to even.
    constexpr A shift = sizeof(A) == 4 ? A(0x1.8p23) : A(0x1.8p52);
    return {__builtin_convertvector((position + shift) - shift, vec<int32_t, N>), vec<A, N>{}};
  }
}

// Where the lanes at pixel i of a run find their curves.
template <int N>
HDROPS_HD LaneCurves<N> lane_curves(const LookupParams& p, const Run& run, int64_t i) {
  return LaneCurves<N>((run.channel + i) % p.layout.width, p.layout.width, p.levels);
}

// Pixels [i, run.count) of a run, as far as whole vectors go; returns the first one left. `table` holds pairs (c,
// delta) if Linear, else c.
template <int N, bool Linear, class In, class Out, class A>
HDROPS_HD int64_t lookup(const LookupParams& p, const Run& run, const A* table, int64_t i, int64_t end, bool stream) {
  const In* input = static_cast<const In*>(p.input) + run.offset;
  Out* output = static_cast<Out*>(p.output) + run.offset;
  auto curves = lane_curves<N>(p, run, i);
  [[maybe_unused]] const bool one_curve = p.layout.width == 1;
  [[maybe_unused]] const A last = A(p.levels - 1);
  for (; i + N <= end; i += N, curves.advance()) {
    vec<A, N> y;
    if constexpr (kIsCode<In>) {
      y = one_curve ? gather_at<N>(table, input + i) : gather<N>(table, load_codes<N>(input + i) + curves.begin);
    } else {
      auto x = load_wide<N>(input + i);
      auto at = locate<Linear, N>(x, last);
      if constexpr (Linear) {
        vec<A, N> value, delta;
        gather_pairs<N>(table, at.index + curves.begin, value, delta);
        y = value + at.fraction * delta;
      } else {
        y = gather<N>(table, at.index + curves.begin);
      }
      y = x == x ? y : x;
    }
    if (stream) {
      store_streaming<N>(output + i, y);
    } else {
      store_narrow<N>(output + i, y);
    }
  }
  return i;
}

template <bool Linear, class In, class Out, class A>
void lookup_parts(LookupTypes<Linear, In, Out>, const LookupParams& p, const A* tables, const Parts& parts,
                  int64_t begin, int64_t end) {
  constexpr int N = kLanes<A>;
  bool stream = worth_streaming<Out>(p.layout.groups * p.layout.length());
  for (int64_t unit = begin; unit < end; ++unit) {
    int64_t group = unit / parts.per_group, part = unit % parts.per_group;
    const A* table = tables + group * p.layout.width * p.levels * (Linear ? 2 : 1);
    for (int64_t pixel = parts.begin(part); pixel < parts.begin(part + 1);) {
      Run run = run_at(p.layout, group, pixel, parts.begin(part + 1));
      int64_t head = until_aligned<N>(static_cast<const Out*>(p.output) + run.offset);
      int64_t i = lookup<1, Linear, In, Out>(p, run, table, 0, Parts::min(head, run.count), false);
      i = lookup<N, Linear, In, Out>(p, run, table, i, run.count, stream);
      lookup<1, Linear, In, Out>(p, run, table, i, run.count, false);
      pixel += run.count;
    }
  }
  streaming_fence();
}

// Both gradients of pixels [i, end) of a run in one pass: the pixels' from the slope table, the curves' as sums per
// level (of g, and if Linear of g * fraction).
template <int N, bool Linear, class In, class Out, class A>
HDROPS_HD int64_t lookup_backward(const LookupParams& p, const Run& run, const A* slopes, double* bins, int32_t copies,
                                  int64_t i, int64_t end, bool stream) {
  const In* input = static_cast<const In*>(p.input) + run.offset;
  const Out* grad_output = static_cast<const Out*>(p.grad_output) + run.offset;
  [[maybe_unused]] Out* grad_input = p.grad_input == nullptr ? nullptr : static_cast<Out*>(p.grad_input) + run.offset;
  [[maybe_unused]] const A last = A(p.levels - 1);
  auto curves = lane_curves<N>(p, run, i);
  auto copy = lane_copies<N>(copies);
  for (; i + N <= end; i += N, curves.advance()) {
    auto g = load_wide<N>(grad_output + i);
    if constexpr (kIsCode<In>) {
      auto bin = load_codes<N>(input + i) + curves.begin;
      add_to_bins<N>(bins, bin * copies + copy, g);
    } else {
      auto x = load_wide<N>(input + i);
      auto at = locate<Linear, N>(x, last);
      auto bin = at.index + curves.begin;
      if (grad_input != nullptr) {
        auto inside = (x >= splat<N>(A(0))) & (x <= splat<N>(A(1)));
        auto gx = inside ? g * gather<N>(slopes, bin) : vec<A, N>{};
        if (stream) {
          store_streaming<N>(grad_input + i, gx);
        } else {
          store_narrow<N>(grad_input + i, gx);
        }
      }
      if (bins != nullptr) {
        auto counted = x == x ? g : vec<A, N>{};
        if constexpr (Linear) {
          add_to_bins<N>(bins, bin * copies + copy, counted, counted * at.fraction);
        } else {
          add_to_bins<N>(bins, bin * copies + copy, counted);
        }
      }
    }
  }
  return i;
}

// `sums` holds a part's bins for each part, or is null where no curve gradient is wanted.
template <bool Linear, class In, class Out, class A>
void lookup_backward_parts(LookupTypes<Linear, In, Out>, const LookupParams& p, const A* tables, double* sums,
                           const Parts& parts, int64_t begin, int64_t end) {
  constexpr int N = kLanes<A>;
  alignas(64) double local[kLocalSums];
  int64_t table_size = p.layout.width * p.levels, sums_per_bin = Linear ? 2 : 1;
  int32_t copies = copies_of_bins(table_size * sums_per_bin);
  bool stream = worth_streaming<Out>(p.layout.groups * p.layout.length());
  for (int64_t unit = begin; unit < end; ++unit) {
    int64_t group = unit / parts.per_group, part = unit % parts.per_group;
    const A* slopes = tables + group * table_size;
    double* total = sums == nullptr ? nullptr : sums + unit * table_size * sums_per_bin;
    double* bins = total == nullptr || copies == 1 ? total : local;
    if (bins != nullptr) memset(bins, 0, size_t(table_size * sums_per_bin * copies) * sizeof(double));
    for (int64_t pixel = parts.begin(part); pixel < parts.begin(part + 1);) {
      Run run = run_at(p.layout, group, pixel, parts.begin(part + 1));
      int64_t head = p.grad_input == nullptr ? 0 : until_aligned<N>(static_cast<const Out*>(p.grad_input) + run.offset);
      head = Parts::min(head, run.count);
      int64_t i = lookup_backward<1, Linear, In, Out>(p, run, slopes, bins, copies, 0, head, false);
      i = lookup_backward<N, Linear, In, Out>(p, run, slopes, bins, copies, i, run.count, stream);
      lookup_backward<1, Linear, In, Out>(p, run, slopes, bins, copies, i, run.count, false);
      pixel += run.count;
    }
    if (bins != total) fold_copies(local, table_size, sums_per_bin, copies, total);
  }
  streaming_fence();
}

}  // namespace HDROPS_ISA
}  // namespace hdrops
