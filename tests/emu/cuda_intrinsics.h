// Functions of one thread that CUDA has and C++ has not, or not in the global namespace. Approximate ones (__expf,
// __fdividef ...) are computed in full accuracy.
#pragma once
#include <math.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

using std::isfinite;
using std::isinf;
using std::isnan;

// ---- min, max: of two integers of one type or of CUDA's mixed pairs; of floats, the one that is not a NaN

template <class T>
  requires std::is_integral_v<T>
constexpr T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
  requires std::is_integral_v<T>
constexpr T max(T a, T b) {
  return a > b ? a : b;
}
constexpr unsigned min(int a, unsigned b) { return min(unsigned(a), b); }
constexpr unsigned min(unsigned a, int b) { return min(a, unsigned(b)); }
constexpr unsigned max(int a, unsigned b) { return max(unsigned(a), b); }
constexpr unsigned max(unsigned a, int b) { return max(a, unsigned(b)); }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(float a, double b) { return fmin(a, b); }
inline double min(double a, float b) { return fmin(a, b); }
inline double max(float a, double b) { return fmax(a, b); }
inline double max(double a, float b) { return fmax(a, b); }

// ---- loads and stores with a hint for the caches

template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldca(const T* from) {
  return *from;
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
void __stcg(T* to, std::type_identity_t<T> value) {
  *to = value;
}
template <class T>
void __stcs(T* to, std::type_identity_t<T> value) {
  *to = value;
}

// ---- bits

inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __popcll(unsigned long long bits) { return std::popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }
inline int __clz(int bits) { return std::countl_zero(unsigned(bits)); }
inline int __clzll(long long bits) { return std::countl_zero(static_cast<unsigned long long>(bits)); }
inline unsigned __brev(unsigned bits) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (bits >> i & 1) << (31 - i);
  return reversed;
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  uint64_t bytes = uint64_t(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    unsigned nibble = selector >> 4 * i & 15, byte = bytes >> 8 * (nibble & 7) & 0xff;
    if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << 8 * i;
  }
  return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return unsigned((uint64_t(high) << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}
inline int __mulhi(int a, int b) { return int(int64_t(a) * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }
inline double __longlong_as_double(long long bits) { return std::bit_cast<double>(bits); }

// ---- conversions: what does not fit becomes the nearest number that does, NaN becomes zero (the lowest number, for
// long long from a double)

namespace emulator {

template <class Int, class Real>
Int saturate(Real whole, Int of_nan = 0) {
  if (std::isnan(whole)) return of_nan;
  if (whole <= Real(std::numeric_limits<Int>::min())) return std::numeric_limits<Int>::min();
  // The limit plus one is a power of two, hence a Real.
  if (whole >= Real(std::numeric_limits<Int>::max() / 2 + 1) * 2) return std::numeric_limits<Int>::max();
  return Int(whole);
}

}  // namespace emulator

#define EMULATOR_CONVERT(name, Real, Int, of_nan)                                                     \
  inline Int __##name##_rd(Real value) { return emulator::saturate<Int>(std::floor(value), of_nan); } \
  inline Int __##name##_ru(Real value) { return emulator::saturate<Int>(std::ceil(value), of_nan); }  \
  inline Int __##name##_rz(Real value) { return emulator::saturate<Int>(std::trunc(value), of_nan); } \
  inline Int __##name##_rn(Real value) { return emulator::saturate<Int>(std::nearbyint(value), of_nan); }
EMULATOR_CONVERT(float2int, float, int, 0)
EMULATOR_CONVERT(float2uint, float, unsigned, 0)
EMULATOR_CONVERT(double2int, double, int, 0)
EMULATOR_CONVERT(double2uint, double, unsigned, 0)
EMULATOR_CONVERT(float2ll, float, long long, std::numeric_limits<long long>::min())
EMULATOR_CONVERT(double2ll, double, long long, std::numeric_limits<long long>::min())
#undef EMULATOR_CONVERT
inline float __int2float_rn(int value) { return float(value); }
inline float __uint2float_rn(unsigned value) { return float(value); }
inline float __ll2float_rn(long long value) { return float(value); }
inline double __int2double_rn(int value) { return double(value); }
inline double __ll2double_rn(long long value) { return double(value); }
inline float __double2float_rn(double value) { return float(value); }

// ---- arithmetic that the compiler must not fuse, and approximations

#define EMULATOR_ROUNDED(prefix, Real, fused)                                            \
  __attribute__((noinline)) inline Real prefix##add_rn(Real a, Real b) { return a + b; } \
  __attribute__((noinline)) inline Real prefix##sub_rn(Real a, Real b) { return a - b; } \
  __attribute__((noinline)) inline Real prefix##mul_rn(Real a, Real b) { return a * b; } \
  inline Real prefix##div_rn(Real a, Real b) { return a / b; }                           \
  inline Real prefix##sqrt_rn(Real a) { return std::sqrt(a); }                           \
  inline Real prefix##rcp_rn(Real a) { return 1 / a; }                                   \
  inline Real prefix##ma_rn(Real a, Real b, Real c) { return fused(a, b, c); }
EMULATOR_ROUNDED(__f, float, fmaf)
EMULATOR_ROUNDED(__d, double, fma)
#undef EMULATOR_ROUNDED
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __frsqrt_rn(float a) { return float(1 / std::sqrt(double(a))); }
inline float rsqrtf(float a) { return float(1 / std::sqrt(double(a))); }
inline double rsqrt(double a) { return 1 / std::sqrt(a); }
inline float __saturatef(float a) { return fminf(fmaxf(a, 0.f), 1.f); }  // NaN becomes zero
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float a) { return expf(a); }
inline float __exp10f(float a) { return powf(10.f, a); }
inline float __logf(float a) { return logf(a); }
inline float __log2f(float a) { return log2f(a); }
inline float __log10f(float a) { return log10f(a); }
inline float __powf(float a, float b) { return powf(a, b); }
inline float __sinf(float a) { return sinf(a); }
inline float __cosf(float a) { return cosf(a); }
#if !defined(_GNU_SOURCE)
inline float exp10f(float a) { return powf(10.f, a); }
inline double exp10(double a) { return pow(10., a); }
#endif
