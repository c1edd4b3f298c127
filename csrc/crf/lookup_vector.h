// Vector pieces of the kernels that look tables up or keep sums per bin. No include guard: the sources that
// foreach_isa.h compiles include this once per instruction set.
namespace hdrops {
namespace HDROPS_ISA {

#if defined(HDROPS_HAVE_AVX512)
// Floats `Bytes` * index past `table`. The masked form, because the plain one leaves GCC warning of its own header.
template <int Bytes>
HDROPS_HD __m512 gather512(const float* table, __m512i index) {
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), __mmask16(0xffff), index, table, Bytes);
}
#endif

#if defined(HDROPS_HAVE_AVX2)
HDROPS_HD __m128 load_two(const float* table, uint32_t a, uint32_t b) {
  return _mm_unpacklo_ps(_mm_load_ss(table + a), _mm_load_ss(table + b));
}
#endif

// table[at[0]], table[at[1]], ...: scalar loads, which beat the gather instruction on AVX2 machines.
template <int N, class T, class Index>
HDROPS_HD vec<T, N> gather_at(const T* table, const Index* at) {
#if defined(HDROPS_HAVE_AVX2)
  if constexpr (N == 8 && sizeof(T) == 4) {
    __m128 low = _mm_movelh_ps(load_two(table, at[0], at[1]), load_two(table, at[2], at[3]));
    __m128 high = _mm_movelh_ps(load_two(table, at[4], at[5]), load_two(table, at[6], at[7]));
    return bit_cast_vec<vec<T, N>>(_mm256_set_m128(high, low));
  }
#endif
  vec<T, N> value{};
  for (int lane = 0; lane < N; ++lane) value[lane] = table[at[lane]];
  return value;
}

// table[index].
template <int N, class T>
HDROPS_HD vec<T, N> gather(const T* table, vec<int32_t, N> index) {
#if defined(HDROPS_HAVE_AVX512)
  if constexpr (N == 16 && sizeof(T) == 4) {
    return bit_cast_vec<vec<T, N>>(gather512<4>(table, bit_cast_vec<__m512i>(index)));
  }
#endif
  uint32_t at[N];
  store<N>(at, bit_cast_vec<vec<uint32_t, N>>(index));
  return gather_at<N>(table, at);
}

// (first, second) = table[index] of a table of pairs.
template <int N, class T>
HDROPS_HD void gather_pairs(const T* table, vec<int32_t, N> index, vec<T, N>& first, vec<T, N>& second) {
  uint32_t at[N];
  store<N>(at, bit_cast_vec<vec<uint32_t, N>>(index));
#if defined(HDROPS_HAVE_AVX512)
  if constexpr (N == 16 && sizeof(T) == 4) {
    first = bit_cast_vec<vec<T, N>>(gather512<8>(table, bit_cast_vec<__m512i>(index)));
    second = bit_cast_vec<vec<T, N>>(gather512<8>(table + 1, bit_cast_vec<__m512i>(index)));
    return;
  }
#endif
#if defined(HDROPS_HAVE_AVX2)
  if constexpr (N == 8 && sizeof(T) == 4) {
    // One 8-byte load a pair; the order of the halves makes the two final shuffles leave the lanes in place.
    const double* pairs = reinterpret_cast<const double*>(table);
    __m128d p01 = _mm_loadh_pd(_mm_load_sd(pairs + at[0]), pairs + at[1]);
    __m128d p23 = _mm_loadh_pd(_mm_load_sd(pairs + at[2]), pairs + at[3]);
    __m128d p45 = _mm_loadh_pd(_mm_load_sd(pairs + at[4]), pairs + at[5]);
    __m128d p67 = _mm_loadh_pd(_mm_load_sd(pairs + at[6]), pairs + at[7]);
    __m256 front = _mm256_castpd_ps(_mm256_set_m128d(p45, p01)), back = _mm256_castpd_ps(_mm256_set_m128d(p67, p23));
    first = bit_cast_vec<vec<T, N>>(_mm256_shuffle_ps(front, back, 0x88));
    second = bit_cast_vec<vec<T, N>>(_mm256_shuffle_ps(front, back, 0xdd));
    return;
  }
#endif
  for (int lane = 0; lane < N; ++lane) {
    first[lane] = table[2 * int64_t(at[lane])];
    second[lane] = table[2 * int64_t(at[lane]) + 1];
  }
}

// Codes as indices. GCC's own conversion takes the bytes apart and puts them together again.
template <int N>
HDROPS_HD vec<int32_t, N> load_codes(const uint8_t* codes) {
#if defined(HDROPS_HAVE_AVX512)
  if constexpr (N == 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    return bit_cast_vec<vec<int32_t, N>>(_mm512_maskz_cvtepu8_epi32(__mmask16(0xffff), bytes));
  }
#endif
#if defined(HDROPS_HAVE_AVX2)
  if constexpr (N == 8) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
    return bit_cast_vec<vec<int32_t, N>>(_mm256_cvtepu8_epi32(bytes));
  }
#endif
  return __builtin_convertvector(__builtin_convertvector(load<N>(codes), vec<uint16_t, N>), vec<int32_t, N>);
}
template <int N>
HDROPS_HD vec<int32_t, N> load_codes(const uint16_t* codes) {
#if defined(HDROPS_HAVE_AVX512)
  if constexpr (N == 16) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    return bit_cast_vec<vec<int32_t, N>>(_mm512_maskz_cvtepu16_epi32(__mmask16(0xffff), words));
  }
#endif
  return __builtin_convertvector(load<N>(codes), vec<int32_t, N>);
}

// a * b - c. In float the product is not rounded, so that the fraction of a large position keeps all its bits.
template <int N>
HDROPS_HD vec<float, N> multiply_subtract(vec<float, N> a, vec<float, N> b, vec<float, N> c) {
#if defined(HDROPS_HAVE_AVX512)
  if constexpr (N == 16) {
    return bit_cast_vec<vec<float, N>>(
        _mm512_fmsub_ps(bit_cast_vec<__m512>(a), bit_cast_vec<__m512>(b), bit_cast_vec<__m512>(c)));
  }
#endif
#if defined(HDROPS_HAVE_AVX2)
  if constexpr (N == 8) {
    return bit_cast_vec<vec<float, N>>(
        _mm256_fmsub_ps(bit_cast_vec<__m256>(a), bit_cast_vec<__m256>(b), bit_cast_vec<__m256>(c)));
  }
#endif
  using Wide = vec<double, N>;
  auto exact = __builtin_convertvector(a, Wide) * __builtin_convertvector(b, Wide) - __builtin_convertvector(c, Wide);
  return __builtin_convertvector(exact, vec<float, N>);
}

template <int N>
HDROPS_HD vec<double, N> multiply_subtract(vec<double, N> a, vec<double, N> b, vec<double, N> c) {
  return a * b - c;
}

// Where each lane's curve begins in the table of a group: the pixels of an interleaved image take its curves in turn.
template <int N>
struct LaneCurves {
  vec<int32_t, N> begin, step, all;

  HDROPS_HD LaneCurves(int64_t first_channel, int64_t width, int64_t levels) {
    int32_t begins[N];
    for (int lane = 0; lane < N; ++lane) begins[lane] = int32_t((first_channel + lane) % width * levels);
    begin = load<N>(begins);
    step = splat<N>(int32_t(N % width * levels));
    all = splat<N>(int32_t(width * levels));
  }

  HDROPS_HD void advance() {
    begin += step;
    begin -= (begin >= all) & all;
  }
};

// Adds a value per lane to the lane's bin. The sums are double: a saturated sky under a mean loss adds one number
// thousands of times, and in float every addition would err to the same side.
template <int N, class V>
HDROPS_HD void add_to_bins(double* bins, vec<int32_t, N> bin, V value) {
  uint32_t at[N];
  store<N>(at, bit_cast_vec<vec<uint32_t, N>>(bin));
#pragma GCC unroll 16
  for (int lane = 0; lane < N; ++lane) bins[at[lane]] += double(value[lane]);
}

// The same for bins of two sums.
template <int N>
HDROPS_HD void add_to_bins(double* bins, vec<int32_t, N> bin, vec<float, N> first, vec<float, N> second) {
  uint32_t at[N];
  uint64_t pairs[N];  // second above first: as two floats in memory, first before second
  store<N>(at, bit_cast_vec<vec<uint32_t, N>>(bin));
  using Bits = vec<uint32_t, N>;
  using Wide = vec<uint64_t, N>;
  store<N>(pairs, __builtin_convertvector(bit_cast_vec<Bits>(first), Wide) |
                      __builtin_convertvector(bit_cast_vec<Bits>(second), Wide) << 32);
#pragma GCC unroll 16
  for (int lane = 0; lane < N; ++lane) {
    double* sums = bins + 2 * int64_t(at[lane]);
    auto pair = __builtin_convertvector(bit_cast_vec<vec<float, 2>>(pairs[lane]), vec<double, 2>);
    store<2>(sums, load<2>(sums) + pair);
  }
}

template <int N>
HDROPS_HD void add_to_bins(double* bins, vec<int32_t, N> bin, vec<double, N> first, vec<double, N> second) {
  for (int lane = 0; lane < N; ++lane) {
    double* sums = bins + 2 * int64_t(bin[lane]);
    sums[0] += first[lane];
    sums[1] += second[lane];
  }
}

// A part's sums, in several copies that neighbouring pixels take in turn where they fit the first cache: equal
// neighbours would otherwise wait for each other's addition. Copies lie side by side, [bin][copy][sums].
constexpr int64_t kLocalSums = 8192;  // doubles on the stack

HDROPS_HD int32_t copies_of_bins(int64_t sums) { return sums * 4 <= kLocalSums ? 4 : sums * 2 <= kLocalSums ? 2 : 1; }

template <int N>
HDROPS_HD vec<int32_t, N> lane_copies(int32_t copies) {
  int32_t copy[N];
  for (int lane = 0; lane < N; ++lane) copy[lane] = lane % copies;
  return load<N>(copy);
}

// Folds the copies of `bins` bins of `sums` sums into `target`.
inline void fold_copies(const double* local, int64_t bins, int64_t sums, int64_t copies, double* target) {
  for (int64_t bin = 0; bin < bins; ++bin) {
    for (int64_t sum = 0; sum < sums; ++sum) {
      double total = 0;
      for (int64_t copy = 0; copy < copies; ++copy) total += local[(bin * copies + copy) * sums + sum];
      target[bin * sums + sum] = total;
    }
  }
}

}  // namespace HDROPS_ISA
}  // namespace hdrops
