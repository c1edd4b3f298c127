// tent_histogram and value_histogram on the CPU: tables, fixed parts, and the parts' sums added in order.
#include "common/dispatch.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "crf/histogram_math.h"
#include "crf/histogram_params.h"

#define HDROPS_ISA_SOURCE "crf/histogram_kernels_cpu.h"
#include "common/foreach_isa.h"

namespace hdrops {
namespace {

constexpr int64_t kPixelsPerPart = 32768;
constexpr int64_t kPixelsPerPiece = 4096;  // of a plane: stays in the first cache while its tent maps are written

template <class T, class A>
void dispatch_tent_planes(const TentParams& p, const A* scale, const A* centre, int64_t begin, int64_t end) {
  HDROPS_ISA_CALL(tent_planes<T>(p, scale, centre, kPixelsPerPiece, begin, end));
}

template <class T, class A>
void dispatch_tent_pixels(const TentParams& p, const A* scale, const A* centre, const int32_t* channel, int64_t begin,
                          int64_t end) {
  HDROPS_ISA_CALL(tent_pixels<T>(p, scale, centre, channel, begin, end));
}

template <class T>
void dispatch_tent_backward(const TentParams& p, int64_t begin, int64_t end) {
  HDROPS_ISA_CALL(tent_backward<T>(p, begin, end));
}

template <class T>
void dispatch_count(const ValueHistogramParams& p, double* sums, const Parts& parts, int64_t begin, int64_t end) {
  HDROPS_ISA_CALL(count_value_parts<T>(p, sums, parts, begin, end));
}

template <class T, class A>
void dispatch_slopes(const ValueHistogramParams& p, const A* slopes, const Parts& parts, int64_t begin, int64_t end) {
  HDROPS_ISA_CALL(value_slope_parts<T>(p, slopes, parts, begin, end));
}

}  // namespace

template <class T>
void tent_histogram_cpu(const TentParams& p) {
  using A = acc_t<T>;
  int64_t repeat = p.interleaved ? p.c : 1, maps = p.tents * repeat;
  Scratch<A> scale(maps), centre(maps);
  Scratch<int32_t> channel(maps);
  int64_t map = 0;
  for (int64_t j = 0; j < p.bin_count; ++j) {
    for (int64_t i = 0; i <= p.bins[j]; ++i) {
      for (int64_t c = 0; c < repeat; ++c, ++map) {
        scale.get()[map] = A(p.bins[j]);
        centre.get()[map] = A(i);
        channel.get()[map] = int32_t(c);
      }
    }
  }
  if (p.interleaved) {
    return parallel_for(p.n * p.p, 512, [&](int64_t begin, int64_t end) {
      dispatch_tent_pixels<T>(p, static_cast<const A*>(scale.get()), static_cast<const A*>(centre.get()), channel.get(),
                              begin, end);
    });
  }
  parallel_for(p.n * p.c * ceil_div(p.p, kPixelsPerPiece), p.p < kPixelsPerPiece ? 1 + kPixelsPerPiece / p.p : 1,
               [&](int64_t begin, int64_t end) {
                 dispatch_tent_planes<T>(p, static_cast<const A*>(scale.get()), static_cast<const A*>(centre.get()),
                                         begin, end);
               });
}

template <class T>
void tent_histogram_backward_cpu(const TentParams& p) {
  parallel_for(p.n * p.c * p.p, 4096, [&](int64_t begin, int64_t end) { dispatch_tent_backward<T>(p, begin, end); });
}

template <class T>
void value_histogram_cpu(const ValueHistogramParams& p) {
  constexpr int64_t most_parts = 256;
  int64_t table_size = p.layout.width * p.bins;
  Parts parts = cut(p.layout, kPixelsPerPart + 8 * table_size, most_parts);
  int64_t units = p.layout.groups * parts.per_group;
  Scratch<double> sums(units * table_size);
  parallel_for(units, parts.grain(),
               [&](int64_t begin, int64_t end) { dispatch_count<T>(p, sums.get(), parts, begin, end); });
  T* output = static_cast<T*>(p.output);
  for (int64_t i = 0; i < p.layout.groups * table_size; ++i) {
    const double* of_group = sums.get() + i / table_size * table_size * parts.per_group + i % table_size;
    double total = 0;
    for (int64_t part = 0; part < parts.per_group; ++part) total += of_group[part * table_size];
    baseline::narrow(acc_t<T>(value_bin(total, i % p.bins, p.bins)), output + i);
  }
}

template <class T>
void value_histogram_backward_cpu(const ValueHistogramParams& p) {
  using A = acc_t<T>;
  int64_t entries = p.layout.groups * p.layout.width * p.bins;
  Scratch<A> slopes(entries);
  const T* grad = static_cast<const T*>(p.grad_output);
  for (int64_t i = 0; i < entries; ++i) {
    slopes.get()[i] = value_slope(baseline::widen(grad[i]), i % p.bins);
  }
  Parts parts = cut(p.layout, kPixelsPerPart, INT64_MAX);
  parallel_for(p.layout.groups * parts.per_group, parts.grain(), [&](int64_t begin, int64_t end) {
    dispatch_slopes<T>(p, static_cast<const A*>(slopes.get()), parts, begin, end);
  });
}

#define HDROPS_INSTANTIATE(T)                                        \
  template void tent_histogram_cpu<T>(const TentParams&);            \
  template void tent_histogram_backward_cpu<T>(const TentParams&);   \
  template void value_histogram_cpu<T>(const ValueHistogramParams&); \
  template void value_histogram_backward_cpu<T>(const ValueHistogramParams&);
HDROPS_INSTANTIATE(float)
HDROPS_INSTANTIATE(double)
HDROPS_INSTANTIATE(bfloat16)
HDROPS_INSTANTIATE(float16)

}  // namespace hdrops
