// Exposure merging, the sums over the frames of 8-bit codes. Compiled per instruction set.
//
// A stream's table holds w and w ln g of each of the 256 codes (merge_plan.cpp), so that a frame costs an element one
// load and no logarithm. accumulate_codes() sums groups of codes side by side: two codes' entries in a vector, or with
// AVX-512 eight fetched by one gather; numbers of frames that are common are unrolled.
namespace hdrops {
namespace HDROPS_ISA {

// Which table a code is read in: one for all; those of three channels in turn, from a channel known to the compiler; or
// as code_offset says.
constexpr int kOneTable = -1, kAnyChannels = 3;

// The terms of code z, the k-th from element i.
template <int kChannel, class A>
HDROPS_HD const A* entry_of_code(const MergeParams<A>& p, const MergeStream<uint8_t, A>& s,
                                 const MergeWorkspace<uint8_t, A>& ws, int64_t i, int k, uint64_t z) {
  const A* entry = s.table + kCodeTerms * z;
  if constexpr (kChannel == kAnyChannels) {
    entry += kCodeTerms * ws.code_offset[i + k];
  } else if constexpr (kChannel != kOneTable) {
    entry += (kChannel + k) % 3 * (kCodeTerms * kCodes8);
  }
  return entry;
}

// Sums of two codes: w and w ln g of the first, then of the second; and those times ln t.
template <class A>
struct PairSums {
  vec<A, 4> terms, timed;
};

template <class A>
HDROPS_HD vec<A, 4> load_two_entries(const A* first, const A* second) {
#if defined(__x86_64__)
  if constexpr (sizeof(A) == 4) {  // the second load fills the upper half, which GCC does not find by itself
    const __m128 low = _mm_castpd_ps(_mm_load_sd(reinterpret_cast<const double*>(first)));
    return bit_cast_vec<vec<A, 4>>(_mm_loadh_pi(low, reinterpret_cast<const __m64*>(second)));
  }
#endif
  return __builtin_shufflevector(load<kCodeTerms>(first), load<kCodeTerms>(second), 0, 1, 2, 3);
}

// Adds a frame's terms of kGroup 8-bit codes from i. Four codes are loaded as one word, since it is loads that bound
// this.
template <int kGroup, int kChannel, bool kShares, class A>
HDROPS_HD void add_frame_of_codes(const MergeParams<A>& p, const MergeStream<uint8_t, A>& s,
                                  const MergeWorkspace<uint8_t, A>& ws, int64_t j, int64_t i,
                                  PairSums<A> (&sums)[kGroup / 2]) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the first code is a word's lowest byte");
  const uint8_t* row = ws.ordered_row[j] + i;
  const A log_exposure = s.log_exposures[j];
  for (int k = 0; k < kGroup; k += 2) {
    uint32_t four;
    __builtin_memcpy(&four, row + k / 4 * 4, 4);
    const uint64_t word = uint64_t(four) >> k % 4 * 8;
    vec<A, 4> terms = load_two_entries(entry_of_code<kChannel>(p, s, ws, i, k, word & 255),
                                       entry_of_code<kChannel>(p, s, ws, i, k + 1, word >> 8 & 255));
    if constexpr (kShares) {
      const A* share = ws.ordered_share[j] + i + k;
      terms *= vec<A, 4>{share[0], share[0], share[1], share[1]};
    }
    sums[k / 2].terms += terms;
    sums[k / 2].timed += terms * log_exposure;
  }
}

// Codes that are summed side by side.
template <class A>
#if defined(HDROPS_HAVE_AVX512)
constexpr int kCodeGroup = sizeof(A) == 4 ? 16 : 8;
#else
constexpr int kCodeGroup = 8;
#endif

#if defined(HDROPS_HAVE_AVX512)
// The places in the table of what entry_of_code() finds for code 0, of eight codes from i + first.
template <int kChannel>
HDROPS_HD vec<int32_t, 8> places_of_zero(const MergeWorkspace<uint8_t, float>& ws, int64_t i, int first) {
  if constexpr (kChannel == kAnyChannels) return load<8>(ws.code_offset + i + first);
  vec<int32_t, 8> place{};
  if constexpr (kChannel != kOneTable) {
    for (int k = 0; k < 8; ++k) place[k] = (kChannel + first + k) % 3 * kCodes8;
  }
  return place;
}

// Of sixteen pairs, the first of each and the second.
HDROPS_HD vec<float, 16> first_terms(vec<float, 16> low, vec<float, 16> high) {
  return __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
HDROPS_HD vec<float, 16> second_terms(vec<float, 16> low, vec<float, 16> high) {
  return __builtin_shufflevector(low, high, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

// accumulate_group() of floats: one gather fetches both terms of eight codes, as eight doubles.
template <int kFrames, int kChannel, bool kShares>
HDROPS_HD void gather_group(const MergeParams<float>& p, const MergeStream<uint8_t, float>& s,
                            MergeWorkspace<uint8_t, float>& ws, int64_t i) {
  const vec<int32_t, 8> zero[2] = {places_of_zero<kChannel>(ws, i, 0), places_of_zero<kChannel>(ws, i, 8)};
  vec<float, 16> terms[2] = {}, timed[2] = {};
  const int64_t frames = kFrames > 0 ? kFrames : p.frames;
#pragma GCC unroll 8
  for (int64_t j = 0; j < frames; ++j) {
    const uint8_t* row = ws.ordered_row[j] + i;
    for (int half = 0; half < 2; ++half) {
      const auto place = bit_cast_vec<__m256i>(load_codes<8>(row + 8 * half) + zero[half]);
      auto entries = bit_cast_vec<vec<float, 16>>(
          _mm512_mask_i32gather_pd(_mm512_setzero_pd(), __mmask8(0xff), place, s.table, kCodeTerms * sizeof(float)));
      if constexpr (kShares) {
        const vec<float, 8> share = load<8>(ws.ordered_share[j] + i + 8 * half);
        entries *= __builtin_shufflevector(share, share, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
      }
      terms[half] += entries;
      timed[half] += entries * s.log_exposures[j];
    }
  }
  store<16>(ws.weight_sum + i, first_terms(terms[0], terms[1]));
  store<16>(ws.value_sum + i, second_terms(terms[0], terms[1]) - first_terms(timed[0], timed[1]));
}
#endif

// Sums of kCodeGroup codes from i, over the frames; of a number known to the compiler (kFrames) unrolled, else 0.
template <int kFrames, int kChannel, bool kShares, class A>
HDROPS_HD void accumulate_group(const MergeParams<A>& p, const MergeStream<uint8_t, A>& s,
                                MergeWorkspace<uint8_t, A>& ws, int64_t i) {
#if defined(HDROPS_HAVE_AVX512)
  if constexpr (sizeof(A) == 4) return gather_group<kFrames, kChannel, kShares>(p, s, ws, i);
#endif
  PairSums<A> sums[4] = {};
  if constexpr (kFrames > 0) {
#pragma GCC unroll 8
    for (int64_t j = 0; j < kFrames; ++j) add_frame_of_codes<8, kChannel, kShares>(p, s, ws, j, i, sums);
  } else {
    for (int64_t j = 0; j < p.frames; ++j) add_frame_of_codes<8, kChannel, kShares>(p, s, ws, j, i, sums);
  }
  auto terms02 = join<A, 4>(sums[0].terms, sums[2].terms), terms13 = join<A, 4>(sums[1].terms, sums[3].terms);
  auto timed02 = join<A, 4>(sums[0].timed, sums[2].timed), timed13 = join<A, 4>(sums[1].timed, sums[3].timed);
  store<8>(ws.weight_sum + i, __builtin_shufflevector(terms02, terms13, 0, 2, 8, 10, 4, 6, 12, 14));
  store<8>(ws.value_sum + i, __builtin_shufflevector(terms02, terms13, 1, 3, 9, 11, 5, 7, 13, 15) -
                                 __builtin_shufflevector(timed02, timed13, 0, 2, 8, 10, 4, 6, 12, 14));
}

// The same of one code.
template <int kChannel, bool kShares, class A>
HDROPS_HD void accumulate_one_code(const MergeParams<A>& p, const MergeStream<uint8_t, A>& s,
                                   MergeWorkspace<uint8_t, A>& ws, int64_t i) {
  A weight = 0, value = 0, timed = 0;
  for (int64_t j = 0; j < p.frames; ++j) {
    auto terms = load<kCodeTerms>(entry_of_code<kChannel>(p, s, ws, i, 0, ws.ordered_row[j][i]));
    if constexpr (kShares) terms *= ws.ordered_share[j][i];
    weight += terms[0];
    value += terms[1];
    timed += terms[0] * s.log_exposures[j];
  }
  ws.weight_sum[i] = weight;
  ws.value_sum[i] = value - timed;
}

template <int kFrames, bool kShares, class A>
void accumulate_codes_of(const MergeParams<A>& p, const MergeStream<uint8_t, A>& s, MergeWorkspace<uint8_t, A>& ws,
                         int64_t count) {
  constexpr int kGroup = kCodeGroup<A>;
  int64_t i = 0;
  if (!p.interleaved || p.table_stride_c == 0) {
    for (; i + kGroup <= count; i += kGroup) accumulate_group<kFrames, kOneTable, kShares>(p, s, ws, i);
    for (; i < count; ++i) accumulate_one_code<kOneTable, kShares>(p, s, ws, i);
    return;
  }
  if (p.channels == 3) {
    for (; i + 3 * kGroup <= count; i += 3 * kGroup) {
      accumulate_group<kFrames, 0, kShares>(p, s, ws, i);
      accumulate_group<kFrames, kGroup % 3, kShares>(p, s, ws, i + kGroup);
      accumulate_group<kFrames, 2 * kGroup % 3, kShares>(p, s, ws, i + 2 * kGroup);
    }
  }
  for (; i + kGroup <= count; i += kGroup) accumulate_group<0, kAnyChannels, kShares>(p, s, ws, i);
  for (; i < count; ++i) accumulate_one_code<kAnyChannels, kShares>(p, s, ws, i);
}

template <bool kShares, class A>
void accumulate_codes(const MergeParams<A>& p, const MergeStream<uint8_t, A>& s, MergeWorkspace<uint8_t, A>& ws,
                      int64_t count) {
  if (p.frames == 3) return accumulate_codes_of<3, kShares>(p, s, ws, count);
  if (p.frames == 4) return accumulate_codes_of<4, kShares>(p, s, ws, count);
  if (p.frames == 5) return accumulate_codes_of<5, kShares>(p, s, ws, count);
  accumulate_codes_of<0, kShares>(p, s, ws, count);
}

}  // namespace HDROPS_ISA
}  // namespace hdrops
