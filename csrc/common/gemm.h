// Matrix product on the compiler's vectors, for tiles that live in the caches. Included inside foreach_isa.h's sources,
// after simd.h; no include guard, each instruction set has its own copy.
//
// C is computed in blocks of kGemmRows x two vectors that stay in registers (4x8 floats with SSE, 6x16 with AVX2, 12x32
// with AVX-512; doubles half of that), B comes in panels of two vectors' width. For each panel all rows of A pass by,
// so the panel (depth x panel) should fit the first-level cache and A (rows x depth) the second. Sums start from zero
// in registers and are added to C at the end, so that a long accumulation over calls is a sum of short ones.
//
// rows must be a multiple of kGemmRows and columns of kLanes: callers pad their tiles.
namespace hdrops {
namespace HDROPS_ISA {

constexpr int kGemmRows = kVectorBytes == 16 ? 4 : kVectorBytes == 32 ? 6 : 12;
// Columns of a panel. A last panel of which at most half is used is computed at half the width.
template <class T>
constexpr int kPanel = 2 * kLanes<T>;

// The sum over k runs over `segments` pieces of `depth` each: element k of segment s is
//   A(i, s, k) = a[i * a_stride + s * a_segment + k]   (a[k * a_stride + s * a_segment + i] if transposed)
//   B(s, k, j) = b[(j / kPanel) * b_panel + s * b_segment + k * b_stride + j % kPanel]
struct GemmShape {
  int64_t rows, columns, depth, segments;
  int64_t a_stride, a_segment;
  int64_t b_stride, b_segment, b_panel;
  int64_t c_stride;
};

template <class T, int kVectors, bool kTransposed, bool kAccumulate>
HDROPS_HD void gemm_block(const GemmShape& shape, const T* a, const T* b, T* c) {
  constexpr int lanes = kLanes<T>;
  using Vec = vec<T, lanes>;
  Vec sum[kGemmRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kGemmRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) sum[i][j] = Vec{};
  }
  const int64_t row = kTransposed ? 1 : shape.a_stride, step = kTransposed ? shape.a_stride : 1;
  for (int64_t segment = 0; segment < shape.segments; ++segment) {
    const T* a_k = a + segment * shape.a_segment;
    const T* b_k = b + segment * shape.b_segment;
    for (int64_t k = 0; k < shape.depth; ++k, a_k += step, b_k += shape.b_stride) {
      Vec right[kVectors];
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) right[j] = load<lanes>(b_k + j * lanes);
#pragma GCC unroll 16
      for (int i = 0; i < kGemmRows; ++i) {
        Vec left = splat<lanes>(a_k[i * row]);
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) sum[i][j] += left * right[j];
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kGemmRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      T* target = c + i * shape.c_stride + j * lanes;
      store<lanes>(target, kAccumulate ? load<lanes>(target) + sum[i][j] : sum[i][j]);
    }
  }
}

// C = A B, or C += A B.
template <class T, bool kTransposed, bool kAccumulate>
void gemm(const GemmShape& shape, const T* a, const T* b, T* c) {
  const int64_t a_block = (kTransposed ? 1 : shape.a_stride) * kGemmRows, c_block = shape.c_stride * kGemmRows;
  const int64_t blocks = shape.rows / kGemmRows;
  for (int64_t column = 0; column < shape.columns; column += kPanel<T>, b += shape.b_panel, c += kPanel<T>) {
    bool full = shape.columns - column > kLanes<T>;
    for (int64_t i = 0; i < blocks; ++i) {
      if (full) {
        gemm_block<T, 2, kTransposed, kAccumulate>(shape, a + i * a_block, b, c + i * c_block);
      } else {
        gemm_block<T, 1, kTransposed, kAccumulate>(shape, a + i * a_block, b, c + i * c_block);
      }
    }
  }
}

}  // namespace HDROPS_ISA
}  // namespace hdrops
