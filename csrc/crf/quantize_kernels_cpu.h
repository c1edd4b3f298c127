// quantize_ste on one instruction set: element by element, in memory order.
namespace hdrops {
namespace HDROPS_ISA {

template <int N, class T, class A>
HDROPS_HD int64_t quantize(const T* input, T* output, A last, int64_t i, int64_t end) {
  for (; i + N <= end; i += N) {
    vec<A, N> x = load_wide<N>(input + i);
    auto clamped = vmin(vmax(x, splat<N>(A(0))), splat<N>(A(1)));
    auto level = __builtin_convertvector(clamped * last + A(0.5), vec<int32_t, N>);
    vec<A, N> y = __builtin_convertvector(level, vec<A, N>) / last;
    store_narrow<N>(output + i, x == x ? y : x);
  }
  return i;
}

template <class T>
void quantize_range(const QuantizeParams& p, int64_t begin, int64_t end) {
  using A = decltype(widen(T{}));
  const T* input = static_cast<const T*>(p.input);
  T* output = static_cast<T*>(p.output);
  int64_t i = quantize<kLanes<A>>(input, output, A(p.levels - 1), begin, end);
  quantize<1>(input, output, A(p.levels - 1), i, end);
}

template <int N, class T, class A>
HDROPS_HD int64_t pass_gradient(const T* grad_output, const T* input, T* grad_input, bool outside, int64_t i,
                                int64_t end) {
  for (; i + N <= end; i += N) {
    vec<A, N> x = load_wide<N>(input + i), g = load_wide<N>(grad_output + i);
    auto inside = (x >= splat<N>(A(0))) & (x <= splat<N>(A(1)));
    auto finite = x - x == vec<A, N>{};
    auto passes = outside ? finite : inside;
    store_narrow<N>(grad_input + i, passes ? g : vec<A, N>{});
  }
  return i;
}

template <class T>
void pass_gradient_range(const QuantizeParams& p, int64_t begin, int64_t end) {
  using A = decltype(widen(T{}));
  const T* grad_output = static_cast<const T*>(p.grad_output);
  const T* input = static_cast<const T*>(p.input);
  T* grad_input = static_cast<T*>(p.grad_input);
  int64_t i = pass_gradient<kLanes<A>, T, A>(grad_output, input, grad_input, p.gradient_outside, begin, end);
  pass_gradient<1, T, A>(grad_output, input, grad_input, p.gradient_outside, i, end);
}

}  // namespace HDROPS_ISA
}  // namespace hdrops
