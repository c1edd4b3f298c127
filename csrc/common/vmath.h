// exp and log of vectors: within about 1 ulp in float, libm's in double. Included once per instruction set, after
// simd.h, by the kernel sources that need it; no include guard for the same reason as there.
namespace hdrops {
namespace HDROPS_ISA {

// exp, with the argument held to [-87, 88] so that the result is a normal number; NaN stays NaN.
template <int N>
HDROPS_HD vec<float, N> vexp(vec<float, N> x) {
  using F = vec<float, N>;
  using I = vec<int32_t, N>;
  x = x < splat<N>(-87.0f) ? splat<N>(-87.0f) : x;
  x = x > splat<N>(88.0f) ? splat<N>(88.0f) : x;
  // Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits too.
  F shifted = x * 1.44269504f + 12582912.0f;
  F power = shifted - 12582912.0f;
  F r = x - power * 0.693359375f;
  r = r + power * 2.12194440e-4f;
  // In pairs, so that the multiplications do not wait for one another.
  F square = r * r;
  F fifth = r * 1.9875691500e-4f + 1.3981999507e-3f;
  F third = r * 8.3334519073e-3f + 4.1665795894e-2f;
  F first = r * 1.6666665459e-1f + 5.0000001201e-1f;
  F series = ((fifth * square + third) * square + first) * square + (r + 1.0f);
  // The series is a normal number near 1, whose exponent takes the power of 2.
  return bit_cast_vec<F>(bit_cast_vec<I>(series) + (bit_cast_vec<I>(shifted) << 23));
}

// log of a positive number, subnormal ones taken as the smallest normal.
template <int N>
HDROPS_HD vec<float, N> vlog(vec<float, N> x) {
  using F = vec<float, N>;
  using I = vec<int32_t, N>;
  x = vmax<F>(x, splat<N>(1.17549435e-38f));
  // Mantissa in [sqrt(1/2), sqrt(2)), so that the series converges alike on both sides of 1.
  I bits = bit_cast_vec<I>(x);
  I exponent = (bits - 0x3f3504f3) >> 23;
  F power = __builtin_convertvector(exponent, F);
  F f = bit_cast_vec<F>(bits - (exponent << 23)) - 1.0f;
  F square = f * f;
  F series = splat<N>(7.0376836292e-2f);
  series = series * f - 1.1514610310e-1f;
  series = series * f + 1.1676998740e-1f;
  series = series * f - 1.2420140846e-1f;
  series = series * f + 1.4249322787e-1f;
  series = series * f - 1.6668057665e-1f;
  series = series * f + 2.0000714765e-1f;
  series = series * f - 2.4999993993e-1f;
  series = series * f + 3.3333331174e-1f;
  F tail = series * f * square - power * 2.12194440e-4f - 0.5f * square;
  return (f + tail) + power * 0.693359375f;
}

// In double libm is called lane by lane; the argument is held to where exp is a normal number.
template <int N>
HDROPS_HD vec<double, N> vexp(vec<double, N> x) {
  x = x < splat<N>(-708.0) ? splat<N>(-708.0) : x;
  x = x > splat<N>(709.0) ? splat<N>(709.0) : x;
  for (int lane = 0; lane < N; ++lane) x[lane] = __builtin_exp(x[lane]);
  return x;
}

template <int N>
HDROPS_HD vec<double, N> vlog(vec<double, N> x) {
  for (int lane = 0; lane < N; ++lane) x[lane] = __builtin_log(x[lane]);
  return x;
}

}  // namespace HDROPS_ISA
}  // namespace hdrops
