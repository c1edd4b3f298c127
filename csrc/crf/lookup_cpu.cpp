// crf_lookup on the CPU: builds the tables, cuts the image into parts of fixed size, runs the kernels of this machine's
// instruction set on them and adds the parts' sums in order.
#include <type_traits>

#include "common/dispatch.h"
#include "common/lut.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "crf/lookup_params.h"

#define HDROPS_ISA_SOURCE "crf/lookup_kernels_cpu.h"
#include "common/foreach_isa.h"

namespace hdrops {
namespace {

constexpr int64_t kPixelsPerPart = 32768;
constexpr int64_t kMostSums = int64_t(2) << 20;  // doubles kept for all parts together, unless one a group needs more
constexpr int64_t kMostParts = 256;

template <class Types, class A>
void dispatch_lookup(Types types, const LookupParams& p, const A* tables, const Parts& parts, int64_t begin,
                     int64_t end) {
  HDROPS_ISA_CALL(lookup_parts(types, p, tables, parts, begin, end));
}

template <class Types, class A>
void dispatch_lookup_backward(Types types, const LookupParams& p, const A* tables, double* sums, const Parts& parts,
                              int64_t begin, int64_t end) {
  HDROPS_ISA_CALL(lookup_backward_parts(types, p, tables, sums, parts, begin, end));
}

// The pairs (c, delta) of one curve.
template <class A>
void fill_pairs(const A* curve, int64_t levels, A* table) {
  for (int64_t i = 0; i < levels; ++i) {
    table[2 * i] = curve[i];
    table[2 * i + 1] = segment_delta(curve, levels, i);
  }
}

template <bool Linear, class A>
void fill_slopes(const A* curve, int64_t levels, A scale, A* table) {
  for (int64_t i = 0; i < levels; ++i) {
    table[i] = Linear ? linear_slope(curve, levels, i) : nearest_slope(curve, i) * scale;
  }
}

template <bool Linear, class In, class Out, class A = acc_t<Out>>
void forward(const LookupParams& p) {
  const A* curve = static_cast<const A*>(p.curve);
  int64_t curves = p.layout.groups * p.layout.width;
  Scratch<A> pairs(Linear ? 2 * curves * p.levels : 0);
  if (Linear) {
    for (int64_t k = 0; k < curves; ++k) fill_pairs(curve + k * p.levels, p.levels, pairs.get() + 2 * k * p.levels);
  }
  const A* tables = Linear ? pairs.get() : curve;
  Parts parts = cut(p.layout, kPixelsPerPart, INT64_MAX);
  parallel_for(p.layout.groups * parts.per_group, parts.grain(), [&](int64_t begin, int64_t end) {
    dispatch_lookup(LookupTypes<Linear, In, Out>{}, p, tables, parts, begin, end);
  });
}

// Adds the sums of a group's parts into those of its first part, bins [begin, end) of all groups.
void add_parts(double* sums, int64_t per_part, int64_t per_group, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    double* first = sums + i / per_part * per_part * per_group + i % per_part;
    double total = *first;
    for (int64_t part = 1; part < per_group; ++part) total += first[part * per_part];
    *first = total;
  }
}

template <bool Linear, class In, class Out, class A = acc_t<Out>>
void backward(const LookupParams& p) {
  constexpr int64_t sums_per_bin = Linear ? 2 : 1;
  const A* curve = static_cast<const A*>(p.curve);
  int64_t curves = p.layout.groups * p.layout.width, per_part = p.layout.width * p.levels * sums_per_bin;
  Scratch<A> slopes(p.grad_input == nullptr ? 0 : curves * p.levels);
  if (p.grad_input != nullptr) {
    for (int64_t k = 0; k < curves; ++k) {
      fill_slopes<Linear>(curve + k * p.levels, p.levels, A(p.gradient_scale), slopes.get() + k * p.levels);
    }
  }
  // A part must be long beside its bins, which have to be cleared and added up.
  bool summing = p.grad_curve != nullptr;
  int64_t least = summing && per_part > kPixelsPerPart / 8 ? 8 * per_part : kPixelsPerPart;
  int64_t most = summing ? Parts::min(kMostParts, kMostSums / per_part) : INT64_MAX;
  Parts parts = cut(p.layout, least, most);
  int64_t units = p.layout.groups * parts.per_group;
  Scratch<double> sums(summing ? units * per_part : 0);
  parallel_for(units, parts.grain(), [&](int64_t begin, int64_t end) {
    dispatch_lookup_backward(LookupTypes<Linear, In, Out>{}, p, slopes.get(), summing ? sums.get() : nullptr, parts,
                             begin, end);
  });
  if (!summing) return;
  parallel_for(p.layout.groups * per_part, 4096,
               [&](int64_t begin, int64_t end) { add_parts(sums.get(), per_part, parts.per_group, begin, end); });
  A* grad_curve = static_cast<A*>(p.grad_curve);
  for (int64_t k = 0; k < curves; ++k) {
    int64_t group = k / p.layout.width, channel = k % p.layout.width;
    const double* of_curve = sums.get() + group * parts.per_group * per_part + channel * p.levels * sums_per_bin;
    for (int64_t i = 0; i < p.levels; ++i) {
      grad_curve[k * p.levels + i] = A(Linear ? linear_curve_gradient(of_curve, p.levels, i) : of_curve[i]);
    }
  }
}

}  // namespace

template <class In, class Out>
void crf_lookup_cpu(const LookupParams& p) {
  if constexpr (std::is_same_v<In, Out>) {
    if (p.linear) return forward<true, In, Out>(p);
  }
  forward<false, In, Out>(p);
}

template <class In, class Out>
void crf_lookup_backward_cpu(const LookupParams& p) {
  if constexpr (std::is_same_v<In, Out>) {
    if (p.linear) return backward<true, In, Out>(p);
  }
  backward<false, In, Out>(p);
}

#define HDROPS_INSTANTIATE(In, Out)                           \
  template void crf_lookup_cpu<In, Out>(const LookupParams&); \
  template void crf_lookup_backward_cpu<In, Out>(const LookupParams&);
#define HDROPS_INSTANTIATE_OUT(Out) \
  HDROPS_INSTANTIATE(Out, Out)      \
  HDROPS_INSTANTIATE(uint8_t, Out)  \
  HDROPS_INSTANTIATE(uint16_t, Out)
HDROPS_INSTANTIATE_OUT(float)
HDROPS_INSTANTIATE_OUT(double)
HDROPS_INSTANTIATE_OUT(bfloat16)
HDROPS_INSTANTIATE_OUT(float16)

}  // namespace hdrops
