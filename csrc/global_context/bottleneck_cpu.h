// The bottleneck between an image's context and the change of its pixels, and its gradients: matrix times vector, for
// images one by one. Weights are of type T, everything else of A.
//
//   z = squeeze context + b1,  n = (z - mean(z)) / sqrt(var(z) + eps),  h = ReLU(gamma n + beta),  t = excite h + b2
//
// The change is t, or sigmoid(t) where it multiplies.
namespace hdrops {
namespace HDROPS_ISA {
namespace context {

template <class T, class A>
HDROPS_HD A dot(const T* a, const A* b, int64_t count) {
  constexpr int L = kLanes<A>;
  vec<A, L> total{};
  A tail = 0;
  int64_t i = 0;
  for (; i + L <= count; i += L) total += load_wide<L>(a + i) * load<L>(b + i);
  for (; i < count; ++i) tail += widen(a[i]) * b[i];
  return reduce_add<A, L>(total) + tail;
}

// target += factor * row
template <class T, class A>
HDROPS_HD void add_scaled(A factor, const T* row, int64_t count, A* target) {
  constexpr int L = kLanes<A>;
  int64_t i = 0;
  for (; i + L <= count; i += L) store<L>(target + i, load<L>(target + i) + factor * load_wide<L>(row + i));
  for (; i < count; ++i) target[i] += factor * widen(row[i]);
}

template <class A>
HDROPS_HD A sigmoid(A x) {
  auto magnitude = weight_of<1, A>(splat<1>(x < 0 ? x : -x))[0];  // exp(-|x|): no overflow
  return (x < 0 ? magnitude : A(1)) / (A(1) + magnitude);
}

// n -> h, not a number where n is not.
template <class T, class A>
HDROPS_HD A rectified(A normalised, T gamma, T beta) {
  const A y = normalised * A(widen(gamma)) + A(widen(beta));
  return y <= 0 ? A(0) : y;
}

// Fills in what follows `context` in the state of images [begin, end); `activations` has [hidden] of scratch each.
template <class T, class A>
void bottleneck_forward(const global_context::Bottleneck& b, int64_t channels, A* states, A* activations, int64_t begin,
                        int64_t end) {
  const T *squeeze = static_cast<const T*>(b.squeeze_weight), *squeeze_bias = static_cast<const T*>(b.squeeze_bias);
  const T *gamma = static_cast<const T*>(b.norm_weight), *beta = static_cast<const T*>(b.norm_bias);
  const T *excite = static_cast<const T*>(b.excite_weight), *excite_bias = static_cast<const T*>(b.excite_bias);
  for (int64_t n = begin; n < end; ++n) {
    global_context::State<A> state{states, channels, b.hidden};
    state.row += n * state.size(channels, b.hidden);
    A *z = state.normalised(), *change = state.change(), *h = activations + n * b.hidden;
    A mean = 0, variance = 0;
    for (int64_t p = 0; p < b.hidden; ++p) {
      z[p] = dot(squeeze + p * channels, state.context(), channels) + A(widen(squeeze_bias[p]));
      mean += z[p];
    }
    mean /= A(b.hidden);
    for (int64_t p = 0; p < b.hidden; ++p) variance += (z[p] - mean) * (z[p] - mean);
    const A inverse_std = A(1) / A(__builtin_sqrt(double(variance / A(b.hidden) + A(b.eps))));
    *state.inverse_std() = inverse_std;
    for (int64_t p = 0; p < b.hidden; ++p) {
      z[p] = (z[p] - mean) * inverse_std;
      h[p] = rectified(z[p], gamma[p], beta[p]);
    }
    for (int64_t c = 0; c < channels; ++c) {
      const A t = dot(excite + c * b.hidden, h, b.hidden) + A(widen(excite_bias[c]));
      change[c] = b.fusion == global_context::Fusion::multiply ? sigmoid(t) : t;
    }
  }
}

template <class T, class A>
void bottleneck_backward(const global_context::Bottleneck& b, int64_t channels, const A* states,
                         const global_context::BottleneckRows<A>& rows, int64_t begin, int64_t end) {
  const T *squeeze = static_cast<const T*>(b.squeeze_weight), *excite = static_cast<const T*>(b.excite_weight);
  const T *gamma = static_cast<const T*>(b.norm_weight), *beta = static_cast<const T*>(b.norm_bias);
  const int64_t hidden = b.hidden;
  for (int64_t n = begin; n < end; ++n) {
    global_context::State<A> state{const_cast<A*>(states), channels, hidden};
    state.row += n * state.size(channels, hidden);
    const A *normalised = state.normalised(), *change = state.change();
    A *dt = rows.change + n * channels, *h = rows.activation + n * hidden, *dy = rows.affine + n * hidden;
    A *dz = rows.squeezed + n * hidden, *context = rows.context + n * channels;
    if (b.fusion == global_context::Fusion::multiply) {
      for (int64_t c = 0; c < channels; ++c) dt[c] *= change[c] * (A(1) - change[c]);
    }
    for (int64_t p = 0; p < hidden; ++p) dy[p] = 0;
    for (int64_t c = 0; c < channels; ++c) add_scaled(dt[c], excite + c * hidden, hidden, dy);
    A mean = 0, slope = 0;  // of the gradient of n, and of it times n
    for (int64_t p = 0; p < hidden; ++p) {
      h[p] = rectified(normalised[p], gamma[p], beta[p]);
      dy[p] = h[p] == 0 ? A(0) : dy[p];
      dz[p] = dy[p] * A(widen(gamma[p]));
      mean += dz[p];
      slope += dz[p] * normalised[p];
    }
    mean /= A(hidden), slope /= A(hidden);
    for (int64_t c = 0; c < channels; ++c) context[c] = 0;
    for (int64_t p = 0; p < hidden; ++p) {
      dz[p] = (dz[p] - mean - normalised[p] * slope) * *state.inverse_std();
      add_scaled(dz[p], squeeze + p * channels, channels, context);
    }
  }
}

// gradient[r, c] = sum over images of left[n, r] right[n, c], of rows [begin, end); `scratch` has [columns].
template <class T, class A>
void outer_products(const A* left, int64_t left_stride, const A* right, int64_t right_stride, int64_t images,
                    int64_t columns, A* scratch, T* gradient, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t c = 0; c < columns; ++c) scratch[c] = 0;
    for (int64_t n = 0; n < images; ++n) {
      add_scaled(left[n * left_stride + r], right + n * right_stride, columns, scratch);
    }
    for (int64_t c = 0; c < columns; ++c) narrow(scratch[c], gradient + r * columns + c);
  }
}

}  // namespace context
}  // namespace HDROPS_ISA
}  // namespace hdrops
