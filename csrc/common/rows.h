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

// target[j, i] = source[i, j] for four rows and columns, converted.
template <class From, class To>
HDROPS_HD void transpose_4x4(const From* source, int64_t source_stride, To* target, int64_t target_stride) {
  auto a = load_wide<4>(source), b = load_wide<4>(source + source_stride);
  auto c = load_wide<4>(source + 2 * source_stride), d = load_wide<4>(source + 3 * source_stride);
  auto ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  auto cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  store_narrow<4>(target, __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5));
  store_narrow<4>(target + target_stride, __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7));
  store_narrow<4>(target + 2 * target_stride, __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5));
  store_narrow<4>(target + 3 * target_stride, __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7));
}

// target[j, i] = source[i, j], converted; rows and columns of the source. The inner loop runs along whichever side has
// the larger stride, whose lines (often one per channel plane, all in the same cache sets) would not survive otherwise.
template <class From, class To>
void copy_transposed(const From* source, int64_t source_stride, To* target, int64_t target_stride, int64_t rows,
                     int64_t columns) {
  int64_t whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
  bool along_rows = source_stride > target_stride;
  int64_t outer_end = along_rows ? whole_rows : whole_columns, inner_end = along_rows ? whole_columns : whole_rows;
  for (int64_t outer = 0; outer < outer_end; outer += 4) {
    for (int64_t inner = 0; inner < inner_end; inner += 4) {
      int64_t i = along_rows ? outer : inner, j = along_rows ? inner : outer;
      transpose_4x4(source + i * source_stride + j, source_stride, target + j * target_stride + i, target_stride);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; ++j) {
      narrow(widen(source[i * source_stride + j]), target + j * target_stride + i);
    }
  }
}

}  // namespace HDROPS_ISA
}  // namespace hdrops
