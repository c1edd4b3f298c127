// Stores that go past the caches, for large outputs that are not read again soon. Included once per instruction set,
// after simd.h, by the kernel sources that need it; no include guard for the same reason as there.
namespace hdrops {
namespace HDROPS_ISA {

// Stores past the caches, for outputs that would only push everything else out of them. `target` is aligned to a
// vector; streaming_fence() makes the stores visible to other threads.
template <int N, class T, class V>
HDROPS_HD void store_streaming(T* target, V value) {
#if defined(HDROPS_HAVE_AVX512)
  if constexpr (sizeof(T) == 4 && N == 16) return _mm512_stream_ps(target, bit_cast_vec<__m512>(value));
#endif
#if defined(HDROPS_HAVE_AVX2)
  if constexpr (sizeof(T) == 4 && N == 8) return _mm256_stream_ps(target, bit_cast_vec<__m256>(value));
#endif
  store_narrow<N>(target, value);
}

HDROPS_HD void streaming_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Whether storing `count` values of T past the caches pays.
template <class T>
HDROPS_HD bool worth_streaming(int64_t count) {
  return sizeof(T) == 4 && count * int64_t(sizeof(T)) >= int64_t(16) << 20;
}

// How many of the elements at `target` come before the first whole vector.
template <int N, class T>
HDROPS_HD int64_t until_aligned(const T* target) {
  return -int64_t(reinterpret_cast<uintptr_t>(target) / sizeof(T)) & (N - 1);
}

}  // namespace HDROPS_ISA
}  // namespace hdrops
