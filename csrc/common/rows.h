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

// The first or last halves of a and b, element by element in turn.
template <bool kHigh, class T>
HDROPS_HD vec<T, 4> interleave(vec<T, 4> a, vec<T, 4> b) {
  constexpr int k = kHigh ? 2 : 0;
  return __builtin_shufflevector(a, b, k, 4 + k, k + 1, 5 + k);
}
template <bool kHigh, class T>
HDROPS_HD vec<T, 8> interleave(vec<T, 8> a, vec<T, 8> b) {
  constexpr int k = kHigh ? 4 : 0;
  return __builtin_shufflevector(a, b, k, 8 + k, k + 1, 9 + k, k + 2, 10 + k, k + 3, 11 + k);
}
template <bool kHigh, class T>
HDROPS_HD vec<T, 16> interleave(vec<T, 16> a, vec<T, 16> b) {
  constexpr int k = kHigh ? 8 : 0;
  return __builtin_shufflevector(a, b, k, 16 + k, k + 1, 17 + k, k + 2, 18 + k, k + 3, 19 + k, k + 4, 20 + k, k + 5,
                                 21 + k, k + 6, 22 + k, k + 7, 23 + k);
}

// target[j, i] = source[i, j], converted, of N rows and columns. In an element's number i N + j, interleaving the first
// half of the rows with the second moves the uppermost bit to the end; when it has moved all bits of i, j N + i is
// left.
template <int N, class From, class To>
HDROPS_HD void transpose_square(const From* source, int64_t source_stride, To* target, int64_t target_stride) {
  using Real = wide_t<From>;
  vec<Real, N> rows[N], turned[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) rows[i] = load_wide<N>(source + i * source_stride);
#pragma GCC unroll 4
  for (int bit = 1; bit < N; bit *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; ++i) {
      turned[2 * i] = interleave<false, Real>(rows[i], rows[i + N / 2]);
      turned[2 * i + 1] = interleave<true, Real>(rows[i], rows[i + N / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) rows[i] = turned[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) store_narrow<N>(target + i * target_stride, rows[i]);
}

// copy_transposed() by squares of N and, of what is left below and beside them, by smaller ones.
template <int N, class From, class To>
HDROPS_HD void transpose_by(const From* source, int64_t source_stride, To* target, int64_t target_stride, int64_t rows,
                            int64_t columns) {
  if constexpr (N < 4) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j)
        narrow(widen(source[i * source_stride + j]), target + j * target_stride + i);
    }
  } else {
    const int64_t whole_rows = rows / N * N, whole_columns = columns / N * N;
    for (int64_t i = 0; i < whole_rows; i += N) {
      for (int64_t j = 0; j < whole_columns; j += N) {
        transpose_square<N>(source + i * source_stride + j, source_stride, target + j * target_stride + i,
                            target_stride);
      }
    }
    transpose_by<N / 2>(source + whole_columns, source_stride, target + whole_columns * target_stride, target_stride,
                        whole_rows, columns - whole_columns);
    transpose_by<N / 2>(source + whole_rows * source_stride, source_stride, target + whole_rows, target_stride,
                        rows - whole_rows, columns);
  }
}

// target[j, i] = source[i, j], converted; rows and columns of the source. A square is as wide as a vector, with
// AVX-512 a line of either side: where planes lie a power of two apart, all their lines fall into one set of the cache,
// and a line that is not used up at once is gone when the next piece of it is needed.
template <class From, class To>
void copy_transposed(const From* source, int64_t source_stride, To* target, int64_t target_stride, int64_t rows,
                     int64_t columns) {
  transpose_by<kLanes<wide_t<From>>>(source, source_stride, target, target_stride, rows, columns);
}

}  // namespace HDROPS_ISA
}  // namespace hdrops
