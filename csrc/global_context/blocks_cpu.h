// The passes over the pixels, for ranges [begin, end) of blocks, or of runs where pixels are written, counted from the
// first image of a group. Each block writes partial sums of its own, each run its own pixels, so that any split among
// threads gives the same bits.
namespace hdrops {
namespace HDROPS_ISA {
namespace context {

// Consecutive pixels of an image.
struct Range {
  int64_t image, first, count;
};

// Part `index` where each image is cut into parts of `length` pixels.
HDROPS_HD Range part_of(const global_context::Images& images, int64_t index, int64_t length) {
  const int64_t parts = (images.pixels + length - 1) / length;
  const int64_t first = index % parts * length, left = images.pixels - first;
  return {index / parts, first, left < length ? left : length};
}

// exp, and 0 where vexp would hold the argument to where exp is a normal number.
template <int N, class A>
HDROPS_HD vec<A, N> weight_of(vec<A, N> x) {
  const auto least = splat<N>(A(sizeof(A) == 4 ? -87 : -708));
  return x < least ? vec<A, N>{} : vexp<N>(x);
}

// The largest of the values, at least the least finite number; NaN is passed over (and meets everyone as a weight).
template <class A>
HDROPS_HD A largest_of(const A* values, int64_t count) {
  constexpr int L = kLanes<A>;
  const A least = A(sizeof(A) == 4 ? -3.402823466e38 : -1.7976931348623157e308);
  vec<A, L> most = splat<L>(least);
  int64_t p = 0;
  for (; p + L <= count; p += L) most = vmax<vec<A, L>>(load<L>(values + p), most);
  A result = least;
  for (int lane = 0; lane < L; ++lane) result = most[lane] > result ? most[lane] : result;
  for (; p < count; ++p) result = values[p] > result ? values[p] : result;
  return result;
}

// logits -> exp(logit - largest), whose sum is returned.
template <class A>
HDROPS_HD A exponentials(A* logits, int64_t count, A largest) {
  constexpr int L = kLanes<A>;
  vec<A, L> total{};
  int64_t p = 0;
  for (; p + L <= count; p += L) {
    auto weight = weight_of<L, A>(load<L>(logits + p) - largest);
    total += weight;
    store<L>(logits + p, weight);
  }
  A sum = reduce_add<A, L>(total);
  for (; p < count; ++p) {
    auto weight = weight_of<1, A>(load<1>(logits + p) - largest);
    sum += weight[0];
    store<1>(logits + p, weight);
  }
  return sum;
}

// partials[block] = (sum over the block of exp(logit - largest) x [C], largest, sum of exp(logit - largest)).
// The key's bias cancels in the softmax; all that is left of it is `key_offset`, 0 or not a number.
template <class Layout, class T, class A>
void pool(const global_context::Images& images, const T* input, const A* key, A key_offset, A* partials, int64_t begin,
          int64_t end) {
  const Layout layout{images.channels, images.pixels};
  alignas(64) A weights[global_context::kMostBlockPixels];
  for (int64_t b = begin; b < end; ++b) {
    const Range block = part_of(images, b, images.block_pixels);
    const T* x = input + block.image * images.size() + layout.offset(block.first);
    A* partial = partials + b * (images.channels + 2);
    layout.template dots<1>(x, block.count, {key}, {weights});
    const A largest = largest_of(weights, block.count) + key_offset;
    partial[images.channels] = largest;
    partial[images.channels + 1] = exponentials(weights, block.count, largest);
    layout.weighted_sums(x, block.count, weights, partial, layout.offset(images.block_pixels));
  }
}

// Last run first: the end of the group is what the caches still hold of the pooling pass.
template <class Layout, class T, class A>
void fuse(const global_context::Images& images, bool multiply, const T* input, const A* changes, int64_t change_stride,
          T* output, int64_t begin, int64_t end) {
  const Layout layout{images.channels, images.pixels};
  const bool stream = worth_streaming<T>(images.batch * images.size());
  for (int64_t r = end - 1; r >= begin; --r) {
    const Range run = part_of(images, r, images.run_pixels());
    const int64_t start = run.image * images.size() + layout.offset(run.first);
    const A* change = changes + run.image * change_stride;
    if (multiply) {
      layout.template fuse<true>(input + start, run.count, change, output + start, stream);
    } else {
      layout.template fuse<false>(input + start, run.count, change, output + start, stream);
    }
  }
  if (stream) streaming_fence();
}

// partials[block] = sum over the block of grad, or with `input` of grad * input, [C].
template <class Layout, class T, class A>
void total(const global_context::Images& images, const T* grad, const T* input, A* partials, int64_t begin,
           int64_t end) {
  const Layout layout{images.channels, images.pixels};
  for (int64_t b = begin; b < end; ++b) {
    const Range block = part_of(images, b, images.block_pixels);
    const int64_t start = block.image * images.size() + layout.offset(block.first);
    A* partial = partials + b * images.channels;
    if (input != nullptr) {
      layout.template channel_sums<true>(grad + start, input + start, block.count, partial);
    } else {
      layout.template channel_sums<false>(grad + start, nullptr, block.count, partial);
    }
  }
}

// With w the softmax weight of a pixel: logits -> w and alignments -> w (<G, x> - <G, context>), the logit's gradient.
template <class A>
HDROPS_HD void logit_gradients(A* logits, A* alignments, int64_t count, const global_context::ImageGradient<A>& image) {
  constexpr int L = kLanes<A>;
  exponentials(logits, count, image.largest);
  const A inverse = A(1) / image.sum;
  int64_t p = 0;
  for (; p + L <= count; p += L) {
    auto weight = load<L>(logits + p) * inverse;
    store<L>(logits + p, weight);
    store<L>(alignments + p, weight * (load<L>(alignments + p) - image.mean));
  }
  for (; p < count; ++p) {
    logits[p] *= inverse;
    alignments[p] = logits[p] * (alignments[p] - image.mean);
  }
}

// For the blocks of one run: the softmax weight of each pixel, its logit's gradient, and if asked for
// key_partials[block] = sum of the logits' gradients times x, [C].
template <class Layout, class T, class A>
void run_logit_gradients(const global_context::Images& images, const Layout& layout, const Range& run, const T* input,
                         const A* key, const global_context::ImageGradient<A>& image, A* key_partials, A* weights,
                         A* slopes) {
  for (int64_t at = 0; at < run.count; at += images.block_pixels) {
    const int64_t left = run.count - at, count = left < images.block_pixels ? left : images.block_pixels;
    const T* x = input + run.image * images.size() + layout.offset(run.first + at);
    layout.template dots<2>(x, count, {key, image.grad_context}, {weights + at, slopes + at});
    logit_gradients(weights + at, slopes + at, count, image);
    if (key_partials != nullptr) {
      const int64_t block = run.image * images.blocks() + (run.first + at) / images.block_pixels;
      layout.weighted_sums(x, count, slopes + at, key_partials + block * images.channels,
                           layout.offset(images.block_pixels));
    }
  }
}

// grad_input = grad_output scale + w G + logit gradient * key; without grad_output its term is left out. Results that
// are null are not computed.
template <class Layout, class T, class A>
void gradient(const global_context::Images& images, const T* grad_output, const T* input, const A* key,
              const global_context::ImageGradient<A>* gradients, T* grad_input, A* key_partials, int64_t begin,
              int64_t end) {
  const Layout layout{images.channels, images.pixels};
  const bool stream = grad_input != nullptr && worth_streaming<T>(images.batch * images.size());
  Buffer scratch(2 * images.run_pixels() * int64_t(sizeof(A)));
  A* weights = static_cast<A*>(scratch.data());
  A* slopes = weights + images.run_pixels();
  for (int64_t r = end - 1; r >= begin; --r) {
    const Range run = part_of(images, r, images.run_pixels());
    const global_context::ImageGradient<A>& image = gradients[run.image];
    run_logit_gradients(images, layout, run, input, key, image, key_partials, weights, slopes);
    if (grad_input == nullptr) continue;
    const int64_t start = run.image * images.size() + layout.offset(run.first);
    const A *scale = image.scale, *direction = image.grad_context;
    T* out = grad_input + start;
    if (grad_output == nullptr) {
      layout.template input_gradient<false, false>(nullptr, run.count, scale, weights, direction, slopes, key, out,
                                                   stream);
    } else if (scale == nullptr) {
      layout.template input_gradient<true, false>(grad_output + start, run.count, scale, weights, direction, slopes,
                                                  key, out, stream);
    } else {
      layout.template input_gradient<true, true>(grad_output + start, run.count, scale, weights, direction, slopes, key,
                                                 out, stream);
    }
  }
  if (stream) streaming_fence();
}

// The same in the images' layout.
template <class T, class A>
void pool_blocks(const global_context::Images& images, const T* input, const A* key, A key_offset, A* partials,
                 int64_t begin, int64_t end) {
  if (images.channels_last) return pool<Interleaved<T, A>>(images, input, key, key_offset, partials, begin, end);
  pool<Planar<T, A>>(images, input, key, key_offset, partials, begin, end);
}

template <class T, class A>
void fuse_runs(const global_context::Images& images, bool multiply, const T* input, const A* changes,
               int64_t change_stride, T* output, int64_t begin, int64_t end) {
  if (images.channels_last) {
    return fuse<Interleaved<T, A>>(images, multiply, input, changes, change_stride, output, begin, end);
  }
  fuse<Planar<T, A>>(images, multiply, input, changes, change_stride, output, begin, end);
}

template <class T, class A>
void total_blocks(const global_context::Images& images, const T* grad, const T* input, A* partials, int64_t begin,
                  int64_t end) {
  if (images.channels_last) return total<Interleaved<T, A>>(images, grad, input, partials, begin, end);
  total<Planar<T, A>>(images, grad, input, partials, begin, end);
}

template <class T, class A>
void gradient_runs(const global_context::Images& images, const T* grad_output, const T* input, const A* key,
                   const global_context::ImageGradient<A>* gradients, T* grad_input, A* key_partials, int64_t begin,
                   int64_t end) {
  if (images.channels_last) {
    return gradient<Interleaved<T, A>>(images, grad_output, input, key, gradients, grad_input, key_partials, begin,
                                       end);
  }
  gradient<Planar<T, A>>(images, grad_output, input, key, gradients, grad_input, key_partials, begin, end);
}

}  // namespace context
}  // namespace HDROPS_ISA
}  // namespace hdrops
