// Vectors of N lanes for the kernels, on the compiler's vector extension: + - * / < & work on them as on numbers, and
// a vector wider than the registers is lowered to several. No include guard: foreach_isa.h includes this once per
// instruction set, and each set has its own copy of everything in `namespace hdrops::HDROPS_ISA`.
namespace hdrops {
namespace HDROPS_ISA {

constexpr int kVectorBytes = HDROPS_VECTOR_BYTES;

// Lanes of a full register.
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class T, int N>
struct VecOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
// vec<T, 1> is a vector of one lane, so that one template serves scalars too.
template <class T, int N>
using vec = typename VecOf<T, N>::type;

template <int N, class T>
HDROPS_HD vec<T, N> splat(T value) {
  return value - vec<T, N>{};
}

template <int N, class T>
HDROPS_HD vec<T, N> load(const T* source) {
  vec<T, N> value;
  __builtin_memcpy(&value, source, sizeof value);
  return value;
}

template <int N, class T>
HDROPS_HD void store(T* target, vec<T, N> value) {
  __builtin_memcpy(target, &value, sizeof value);
}

// Bitwise reinterpretation between vectors of one size.
template <class To, class From>
HDROPS_HD To bit_cast_vec(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  __builtin_memcpy(&result, &value, sizeof result);
  return result;
}

template <class V>
HDROPS_HD V vmin(V a, V b) {
  return a < b ? a : b;
}

template <class V>
HDROPS_HD V vmax(V a, V b) {
  return a > b ? a : b;
}

// Loads of N lanes as the accumulation type: float for the 16-bit formats.
template <int N>
HDROPS_HD vec<float, N> load_wide(const float* source) {
  return load<N>(source);
}

template <int N>
HDROPS_HD vec<double, N> load_wide(const double* source) {
  return load<N>(source);
}

template <int N>
HDROPS_HD vec<float, N> load_wide(const bfloat16* source) {
  auto bits = __builtin_convertvector(load<N>(reinterpret_cast<const uint16_t*>(source)), vec<uint32_t, N>);
  return bit_cast_vec<vec<float, N>>(bits << 16);
}

template <int N>
HDROPS_HD vec<float, N> load_wide(const float16* source) {
  vec<float, N> value{};
  int i = 0;
#if defined(HDROPS_HAVE_AVX2)
  if constexpr (N == 16) {
    auto low = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
    auto high = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + 8)));
    __builtin_memcpy(&value, &low, 32);
    __builtin_memcpy(reinterpret_cast<char*>(&value) + 32, &high, 32);
    i = 16;
  } else if constexpr (N == 8) {
    auto all = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
    __builtin_memcpy(&value, &all, 32);
    i = 8;
  }
#endif
  for (; i < N; ++i) value[i] = to_float(source[i]);
  return value;
}

// Stores of N lanes of the accumulation type, rounded to nearest even for the 16-bit formats.
template <int N>
HDROPS_HD void store_narrow(float* target, vec<float, N> value) {
  store<N>(target, value);
}

template <int N>
HDROPS_HD void store_narrow(double* target, vec<double, N> value) {
  store<N>(target, value);
}

template <int N>
HDROPS_HD void store_narrow(bfloat16* target, vec<float, N> value) {
  auto bits = bit_cast_vec<vec<uint32_t, N>>(value);
  auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  auto quiet = (bits >> 16) | 0x40u;
  auto is_nan = (bits & 0x7fffffffu) > splat<N>(uint32_t(0x7f800000u));
  auto chosen = is_nan ? quiet : rounded;
  store<N>(reinterpret_cast<uint16_t*>(target), __builtin_convertvector(chosen, vec<uint16_t, N>));
}

template <int N>
HDROPS_HD void store_narrow(float16* target, vec<float, N> value) {
  int i = 0;
#if defined(HDROPS_HAVE_AVX2)
  if constexpr (N % 8 == 0) {
    for (; i < N; i += 8) {
      __m256 part;
      __builtin_memcpy(&part, reinterpret_cast<const char*>(&value) + 4 * i, 32);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i), _mm256_cvtps_ph(part, _MM_FROUND_TO_NEAREST_INT));
    }
  }
#endif
  for (; i < N; ++i) target[i] = to_float16(value[i]);
}

// Scalar forms with the same names, for tails and one-lane code.
HDROPS_HD float widen(float value) { return value; }
HDROPS_HD double widen(double value) { return value; }
HDROPS_HD float widen(bfloat16 value) { return to_float(value); }
HDROPS_HD float widen(float16 value) { return to_float(value); }
HDROPS_HD void narrow(float value, float* target) { *target = value; }
HDROPS_HD void narrow(double value, double* target) { *target = value; }
HDROPS_HD void narrow(float value, bfloat16* target) { *target = to_bfloat16(value); }
HDROPS_HD void narrow(float value, float16* target) { *target = to_float16(value); }

// The lower half of the lanes plus the upper.
template <class T, int N>
HDROPS_HD vec<T, N / 2> add_halves(vec<T, N> value) {
  vec<T, N / 2> low, high;
  __builtin_memcpy(&low, &value, sizeof low);
  __builtin_memcpy(&high, reinterpret_cast<const char*>(&value) + sizeof low, sizeof high);
  return low + high;
}

// Four or eight lanes and as many more. A copy through memory, which would serve any number, waits for its stores.
template <class T, int N>
HDROPS_HD vec<T, 2 * N> join(vec<T, N> low, vec<T, N> high) {
  static_assert(N == 4 || N == 8);
  if constexpr (N == 4) {
    return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
  } else {
    return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
}

// Sum of the lanes, pairwise, in an order fixed by N.
template <class T, int N>
HDROPS_HD T reduce_add(vec<T, N> value) {
  if constexpr (N == 1) {
    return value[0];
  } else {
    return reduce_add<T, N / 2>(add_halves<T, N>(value));
  }
}

// The four sums of lanes, by pairwise additions that four vectors share.
template <class T, int N>
HDROPS_HD void reduce_four(vec<T, N> a, vec<T, N> b, vec<T, N> c, vec<T, N> d, T* sum_a, T* sum_b, T* sum_c, T* sum_d) {
  if constexpr (N < 4) {
    *sum_a = reduce_add<T, N>(a), *sum_b = reduce_add<T, N>(b), *sum_c = reduce_add<T, N>(c),
    *sum_d = reduce_add<T, N>(d);
  } else if constexpr (N > 4) {
    reduce_four<T, N / 2>(add_halves<T, N>(a), add_halves<T, N>(b), add_halves<T, N>(c), add_halves<T, N>(d), sum_a,
                          sum_b, sum_c, sum_d);
  } else {
    auto ab = __builtin_shufflevector(a, b, 0, 4, 2, 6) + __builtin_shufflevector(a, b, 1, 5, 3, 7);
    auto cd = __builtin_shufflevector(c, d, 0, 4, 2, 6) + __builtin_shufflevector(c, d, 1, 5, 3, 7);
    auto sums = __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
    *sum_a = sums[0], *sum_b = sums[1], *sum_c = sums[2], *sum_d = sums[3];
  }
}

}  // namespace HDROPS_ISA
}  // namespace hdrops
