// Product of bf16 matrices with float sums, by AVX-512's dot product of pairs where the machine has it. Included inside
// foreach_isa.h's sources, after gemm.h, whose shape and blocks it shares; no include guard.
//
// A is row-major, two successive k one pair. B holds its pairs interleaved, so that a vector has one pair of each
// column; of an odd depth the last pair is filled with zeros:
//   A(i, s, k) = a[i * a_stride + s * a_segment + k]
//   B(s, k, j) = b[(j / kPanel) * b_panel + s * b_segment + (k / 2) * b_stride + j % kPanel * 2 + k % 2]
namespace hdrops {
namespace HDROPS_ISA {

template <int N>
using Pairs = vec<uint32_t, N>;  // the first bf16 of a pair lies in the lower half

// sum + left * right, both products of each pair. The instruction takes subnormal numbers for zero.
template <int N>
HDROPS_HD vec<float, N> add_dot(vec<float, N> sum, Pairs<N> left, Pairs<N> right) {
#if defined(HDROPS_HAVE_AVX512_BF16)
  return bit_cast_vec<vec<float, N>>(
      _mm512_dpbf16_ps(bit_cast_vec<__m512>(sum), bit_cast_vec<__m512bh>(left), bit_cast_vec<__m512bh>(right)));
#else
  const auto upper = splat<N>(uint32_t(0xffff0000u));
  using Floats = vec<float, N>;
  sum += bit_cast_vec<Floats>(left & upper) * bit_cast_vec<Floats>(right & upper);
  return sum + bit_cast_vec<Floats>(left << 16) * bit_cast_vec<Floats>(right << 16);
#endif
}

HDROPS_HD uint32_t load_pair(const bfloat16* source) {
  uint32_t pair;
  __builtin_memcpy(&pair, source, sizeof pair);
  return pair;
}

// What follows the last element of an odd depth belongs to others, and may be NaN.
HDROPS_HD uint32_t load_last(const bfloat16* source) { return source->bits; }

// One pair of k: sum[i, j] += A(i, pair) * B(pair, j), or of the last k alone.
template <int kVectors, bool kLast, int N>
HDROPS_HD void add_pair(const bfloat16* a, int64_t a_stride, const bfloat16* b,
                        vec<float, N> (&sum)[kGemmRows][kVectors]) {
  Pairs<N> right[kVectors];
#pragma GCC unroll 2
  for (int j = 0; j < kVectors; ++j) right[j] = bit_cast_vec<Pairs<N>>(load<2 * N>(&b[j * 2 * N].bits));
#pragma GCC unroll 16
  for (int i = 0; i < kGemmRows; ++i) {
    auto left = splat<N>(kLast ? load_last(a + i * a_stride) : load_pair(a + i * a_stride));
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) sum[i][j] = add_dot<N>(sum[i][j], left, right[j]);
  }
}

template <int kVectors, bool kAccumulate>
HDROPS_HD void gemm_bf16_block(const GemmShape& shape, const bfloat16* a, const bfloat16* b, float* c) {
  constexpr int lanes = kLanes<float>;
  vec<float, lanes> sum[kGemmRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kGemmRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) sum[i][j] = vec<float, lanes>{};
  }
  for (int64_t segment = 0; segment < shape.segments; ++segment) {
    const bfloat16* a_k = a + segment * shape.a_segment;
    const bfloat16* b_k = b + segment * shape.b_segment;
    for (int64_t pair = 0; pair < shape.depth / 2; ++pair, a_k += 2, b_k += shape.b_stride) {
      add_pair<kVectors, false, lanes>(a_k, shape.a_stride, b_k, sum);
    }
    if (shape.depth % 2 != 0) add_pair<kVectors, true, lanes>(a_k, shape.a_stride, b_k, sum);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kGemmRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      float* target = c + i * shape.c_stride + j * lanes;
      store<lanes>(target, kAccumulate ? load<lanes>(target) + sum[i][j] : sum[i][j]);
    }
  }
}

// C = A B, or C += A B.
template <bool kAccumulate>
void gemm_bf16(const GemmShape& shape, const bfloat16* a, const bfloat16* b, float* c) {
  constexpr int panel = kPanel<float>;
  for (int64_t column = 0; column < shape.columns; column += panel, b += shape.b_panel, c += panel) {
    bool full = shape.columns - column > kLanes<float>;
    for (int64_t i = 0; i < shape.rows; i += kGemmRows) {
      if (full) {
        gemm_bf16_block<2, kAccumulate>(shape, a + i * shape.a_stride, b, c + i * shape.c_stride);
      } else {
        gemm_bf16_block<1, kAccumulate>(shape, a + i * shape.a_stride, b, c + i * shape.c_stride);
      }
    }
  }
}

}  // namespace HDROPS_ISA
}  // namespace hdrops
