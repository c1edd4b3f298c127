// Rows of data between their storage type and the type that sums are kept in, and transposition. Included inside
// foreach_isa.h's sources, after simd.h; no include guard, each instruction set has its own copy.
namespace hdrops {
namespace HDROPS_ISA {

// Sums and coordinates of data of type T are kept in wide_t<T>.
template <class T>
struct WideType {
  using type = float;
};
template <>
struct WideType<double> {
  using type = double;
};
template <class T>
using wide_t = typename WideType<T>::type;

template <class T, class Real>
void widen_row(const T* source, int64_t count, Real* target) {
  constexpr int lanes = kLanes<Real>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store<lanes>(target + i, load_wide<lanes>(source + i));
  for (; i < count; ++i) target[i] = widen(source[i]);
}

template <class Real, class T>
void narrow_row(const Real* source, int64_t count, T* target) {
  constexpr int lanes = kLanes<Real>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store_narrow<lanes>(target + i, load<lanes>(source + i));
  for (; i < count; ++i) narrow(source[i], target + i);
}

// Fetches `count` elements in each of many planes: short pieces far apart, which no prefetcher of the processor
// foresees.
template <class T>
void fetch_planes(const T* data, int64_t plane, int64_t planes, int64_t count) {
  for (int64_t c = 0; c < planes; ++c) {
    for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(data + c * plane + i, 0, 2);
  }
}

// Four elements of a row, then four of the row four further on, and so on until there are N.
template <int N, class From>
HDROPS_HD auto load_quads(const From* source, int64_t stride) {
  if constexpr (N == 4) {
    return load_wide<4>(source);
  } else {
    auto low = load_quads<N / 2>(source, stride), high = load_quads<N / 2>(source + N / 2 * stride, stride);
    return join<wide_t<From>, N / 2>(low, high);
  }
}

// The first or last two elements of every quad of a, each before that of b.
template <bool kHigh, class T, int N>
HDROPS_HD vec<T, N> interleave_quads(vec<T, N> a, vec<T, N> b) {
  constexpr int k = kHigh ? 2 : 0;
  if constexpr (N == 4) {
    return __builtin_shufflevector(a, b, k, 4 + k, k + 1, 5 + k);
  } else if constexpr (N == 8) {
    return __builtin_shufflevector(a, b, k, 8 + k, k + 1, 9 + k, 4 + k, 12 + k, 5 + k, 13 + k);
  } else {
    return __builtin_shufflevector(a, b, k, 16 + k, k + 1, 17 + k, 4 + k, 20 + k, 5 + k, 21 + k, 8 + k, 24 + k, 9 + k,
                                   25 + k, 12 + k, 28 + k, 13 + k, 29 + k);
  }
}

// The first or last pair of every quad of a, each before that of b.
template <bool kHigh, class T, int N>
HDROPS_HD vec<T, N> interleave_pairs(vec<T, N> a, vec<T, N> b) {
  constexpr int k = kHigh ? 2 : 0;
  if constexpr (N == 4) {
    return __builtin_shufflevector(a, b, k, k + 1, 4 + k, 5 + k);
  } else if constexpr (N == 8) {
    return __builtin_shufflevector(a, b, k, k + 1, 8 + k, 9 + k, 4 + k, 5 + k, 12 + k, 13 + k);
  } else {
    return __builtin_shufflevector(a, b, k, k + 1, 16 + k, 17 + k, 4 + k, 5 + k, 20 + k, 21 + k, 8 + k, 9 + k, 24 + k,
                                   25 + k, 12 + k, 13 + k, 28 + k, 29 + k);
  }
}

// target[j, i] = source[i, j] for N rows and four columns, converted.
template <int N, class From, class To>
HDROPS_HD void transpose_block(const From* source, int64_t source_stride, To* target, int64_t target_stride) {
  using Real = wide_t<From>;
  auto a = load_quads<N>(source, source_stride), b = load_quads<N>(source + source_stride, source_stride);
  auto c = load_quads<N>(source + 2 * source_stride, source_stride);
  auto d = load_quads<N>(source + 3 * source_stride, source_stride);
  auto ab_low = interleave_quads<false, Real, N>(a, b), ab_high = interleave_quads<true, Real, N>(a, b);
  auto cd_low = interleave_quads<false, Real, N>(c, d), cd_high = interleave_quads<true, Real, N>(c, d);
  store_narrow<N>(target, interleave_pairs<false, Real, N>(ab_low, cd_low));
  store_narrow<N>(target + target_stride, interleave_pairs<true, Real, N>(ab_low, cd_low));
  store_narrow<N>(target + 2 * target_stride, interleave_pairs<false, Real, N>(ab_high, cd_high));
  store_narrow<N>(target + 3 * target_stride, interleave_pairs<true, Real, N>(ab_high, cd_high));
}

// copy_transposed() of rows [begin, end), as far as blocks of N rows go; returns the first row left.
template <int N, class From, class To>
HDROPS_HD int64_t transpose_rows(const From* source, int64_t source_stride, To* target, int64_t target_stride,
                                 int64_t begin, int64_t end, int64_t columns) {
  const int64_t rows = (end - begin) / N * N;
  const bool along_rows = source_stride > target_stride;
  const int64_t outer_end = along_rows ? rows : columns, outer_step = along_rows ? N : 4;
  const int64_t inner_end = along_rows ? columns : rows, inner_step = along_rows ? 4 : N;
  for (int64_t outer = 0; outer < outer_end; outer += outer_step) {
    for (int64_t inner = 0; inner < inner_end; inner += inner_step) {
      const int64_t i = begin + (along_rows ? outer : inner), j = along_rows ? inner : outer;
      transpose_block<N>(source + i * source_stride + j, source_stride, target + j * target_stride + i, target_stride);
    }
  }
  return begin + rows;
}

// target[j, i] = source[i, j], converted; rows and columns of the source. A block has as many rows as a vector has
// lanes, so that the lines of the target are written whole. The inner loop runs along whichever side has the larger
// stride, whose lines (often one per channel plane, all in the same cache sets) would not survive otherwise.
template <class From, class To>
void copy_transposed(const From* source, int64_t source_stride, To* target, int64_t target_stride, int64_t rows,
                     int64_t columns) {
  constexpr int lanes = kLanes<wide_t<From>>;
  const int64_t whole_columns = columns / 4 * 4;
  int64_t whole_rows = 0;
  if constexpr (lanes > 4) {
    whole_rows = transpose_rows<lanes>(source, source_stride, target, target_stride, 0, rows, whole_columns);
  }
  whole_rows = transpose_rows<4>(source, source_stride, target, target_stride, whole_rows, rows, whole_columns);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; ++j) {
      narrow(widen(source[i * source_stride + j]), target + j * target_stride + i);
    }
  }
}

}  // namespace HDROPS_ISA
}  // namespace hdrops
