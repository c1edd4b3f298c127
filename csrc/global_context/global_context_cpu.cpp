// Launches the kernels of global context group by group of images, and adds the blocks' partial sums in order.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/dispatch.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "global_context/params.h"

#define HDROPS_ISA_SOURCE "global_context/kernels_cpu.h"
#include "common/foreach_isa.h"

namespace hdrops::global_context {
namespace {

constexpr int64_t kBlockBytes = 256 << 10;            // of an image: half of a common level-2 cache
constexpr int64_t kRuns = 32;                         // of an image at least, if it has as many blocks
constexpr int64_t kGroupBytes = int64_t(8) << 20;     // of images
constexpr int64_t kWorkPerThread = int64_t(1) << 16;  // elements that a pass reads, or multiply-adds

// The kernels on a range, on this machine's instruction set.
template <class T, class A>
void pool(const Images& images, const T* input, const A* key, A key_offset, A* partials, int64_t begin, int64_t end) {
  HDROPS_ISA_CALL(context::pool_blocks(images, input, key, key_offset, partials, begin, end));
}

template <class T, class A>
void fuse(const Images& images, bool multiply, const T* input, const A* changes, int64_t stride, T* output,
          int64_t begin, int64_t end) {
  HDROPS_ISA_CALL(context::fuse_runs(images, multiply, input, changes, stride, output, begin, end));
}

template <class T, class A>
void total(const Images& images, const T* grad, const T* input, A* partials, int64_t begin, int64_t end) {
  HDROPS_ISA_CALL(context::total_blocks(images, grad, input, partials, begin, end));
}

template <class T, class A>
void gradient(const Images& images, const T* grad_output, const T* input, const A* key,
              const ImageGradient<A>* gradients, T* grad_input, A* key_partials, int64_t begin, int64_t end) {
  HDROPS_ISA_CALL(
      context::gradient_runs(images, grad_output, input, key, gradients, grad_input, key_partials, begin, end));
}

template <class T, class A>
void bottleneck(const Bottleneck& b, int64_t channels, A* states, A* activations, int64_t begin, int64_t end) {
  HDROPS_ISA_CALL(context::bottleneck_forward<T>(b, channels, states, activations, begin, end));
}

template <class T, class A>
void bottleneck_gradients(const Bottleneck& b, int64_t channels, const A* states, const BottleneckRows<A>& rows,
                          int64_t begin, int64_t end) {
  HDROPS_ISA_CALL(context::bottleneck_backward<T>(b, channels, states, rows, begin, end));
}

template <class T, class A>
void outer(const A* left, int64_t left_stride, const A* right, int64_t right_stride, int64_t batch, int64_t columns,
           A* scratch, T* gradient, int64_t begin, int64_t end) {
  HDROPS_ISA_CALL(
      context::outer_products(left, left_stride, right, right_stride, batch, columns, scratch, gradient, begin, end));
}

// Calls run(begin, end) for ranges of the blocks of `count` images.
template <class F>
void for_blocks(const Images& images, int64_t count, const F& run) {
  parallel_for(count * images.blocks(), std::max<int64_t>(1, kWorkPerThread / (images.block_pixels * images.channels)),
               run);
}

template <class F>
void for_runs(const Images& images, int64_t count, const F& run) {
  parallel_for(count * images.runs(), std::max<int64_t>(1, kWorkPerThread / (images.run_pixels() * images.channels)),
               run);
}

// Calls run(first image, images) for one group after the other.
template <class F>
void for_groups(const Images& images, const F& run) {
  for (int64_t first = 0; first < images.batch; first += images.images_per_group) {
    run(first, std::min(images.images_per_group, images.batch - first));
  }
}

template <class A, class T>
std::vector<A> widened(const void* values, int64_t count) {
  std::vector<A> result(size_t(count), A(0));
  for (int64_t k = 0; k < count; ++k) result[size_t(k)] = A(baseline::widen(static_cast<const T*>(values)[k]));
  return result;
}

// One image's state from its blocks' partial sums.
template <class A>
void merge(const Images& images, const A* partials, A* state) {
  const int64_t channels = images.channels, size = channels + 2;
  double largest = std::numeric_limits<A>::lowest();
  for (int64_t b = 0; b < images.blocks(); ++b) largest = std::max(largest, double(partials[b * size + channels]));
  std::vector<double> sums(size_t(channels), 0.0);
  double sum = 0;
  for (int64_t b = 0; b < images.blocks(); ++b) {
    const A* partial = partials + b * size;
    const double factor = std::exp(double(partial[channels]) - largest);
    sum += factor * double(partial[channels + 1]);
    for (int64_t c = 0; c < channels; ++c) sums[size_t(c)] += factor * double(partial[c]);
  }
  for (int64_t c = 0; c < channels; ++c) state[c] = A(sums[size_t(c)] / sum);
  state[channels] = A(largest), state[channels + 1] = A(sum);
}

// total[c] = sum of the rows [count, channels].
template <class A>
void add_rows(const A* rows, int64_t count, int64_t channels, double* total) {
  for (int64_t b = 0; b < count; ++b) {
    for (int64_t c = 0; c < channels; ++c) total[c] += double(rows[b * channels + c]);
  }
}

// A pooling pass over a group.
template <class T, class A>
void pool_group(const Images& images, int64_t count, const T* input, const A* key, A key_offset, A* partials, A* states,
                int64_t stride) {
  for_blocks(images, count,
             [&](int64_t begin, int64_t end) { pool(images, input, key, key_offset, partials, begin, end); });
  for (int64_t n = 0; n < count; ++n) {
    merge(images, partials + n * images.blocks() * (images.channels + 2), states + n * stride);
  }
}

// 0, or not a number where the key's bias is not a finite number: all of it that the softmax leaves.
template <class T, class A>
A offset_of(const void* bias) {
  if (bias == nullptr) return 0;
  const A value = baseline::widen(*static_cast<const T*>(bias));
  return value - value;
}

}  // namespace

Images cut(int64_t batch, int64_t channels, int64_t pixels, bool channels_last, int64_t element_bytes) {
  Images images{batch, channels, pixels, channels_last, 0, 0, 0};
  const int64_t fitting = kBlockBytes / (channels * element_bytes) / 16 * 16;
  images.block_pixels = std::clamp<int64_t>(fitting, 16, kMostBlockPixels);
  const int64_t most_blocks = std::max<int64_t>(1, kMostRunPixels / images.block_pixels);
  images.run_blocks = channels_last ? 1 : std::clamp<int64_t>(images.blocks() / kRuns, 1, most_blocks);
  images.images_per_group =
      std::clamp<int64_t>(kGroupBytes / (images.size() * element_bytes), 1, std::max<int64_t>(batch, 1));
  return images;
}

template <class T>
void pool_cpu(const Images& images, const void* input, const void* key_weight, const void* key_bias, void* state,
              void* context) {
  using A = acc_t<T>;
  const std::vector<A> key = widened<A, T>(key_weight, images.channels);
  Scratch<A> partials(images.images_per_group * images.blocks() * (images.channels + 2));
  const int64_t stride = State<A>::pool_size(images.channels);
  for_groups(images, [&](int64_t first, int64_t count) {
    pool_group(images, count, static_cast<const T*>(input) + first * images.size(), key.data(),
               offset_of<T, A>(key_bias), partials.get(), static_cast<A*>(state) + first * stride, stride);
  });
  for (int64_t n = 0; n < images.batch; ++n) {
    for (int64_t c = 0; c < images.channels; ++c) {
      baseline::narrow(static_cast<A*>(state)[n * stride + c], static_cast<T*>(context) + n * images.channels + c);
    }
  }
}

template <class T>
void forward_cpu(const Images& images, const Bottleneck& b, const void* input, const void* key_weight,
                 const void* key_bias, void* state, void* output) {
  using A = acc_t<T>;
  const std::vector<A> key = widened<A, T>(key_weight, images.channels);
  Scratch<A> partials(images.images_per_group * images.blocks() * (images.channels + 2));
  Scratch<A> activations(images.images_per_group * b.hidden);
  const int64_t stride = State<A>::size(images.channels, b.hidden);
  for_groups(images, [&](int64_t first, int64_t count) {
    const T* pixels = static_cast<const T*>(input) + first * images.size();
    A* states = static_cast<A*>(state) + first * stride;
    pool_group(images, count, pixels, key.data(), offset_of<T, A>(key_bias), partials.get(), states, stride);
    parallel_for(
        count, std::max<int64_t>(1, kWorkPerThread / (2 * b.hidden * images.channels)),
        [&](int64_t begin, int64_t end) { bottleneck<T>(b, images.channels, states, activations.get(), begin, end); });
    const State<A> one{states, images.channels, b.hidden};
    for_runs(images, count, [&](int64_t begin, int64_t end) {
      fuse(images, b.fusion == Fusion::multiply, pixels, one.change(), stride,
           static_cast<T*>(output) + first * images.size(), begin, end);
    });
  });
}

namespace {

// The passes of a backward over a group that follow when G is known: grad_input, and the sum for the key's gradient.
template <class T, class A>
void gradient_group(const Images& images, int64_t count, const T* grad_output, const T* input, const A* key,
                    const ImageGradient<A>* gradients, T* grad_input, A* key_partials, double* key_total) {
  if (grad_input == nullptr && key_partials == nullptr) return;
  for_runs(images, count, [&](int64_t begin, int64_t end) {
    gradient(images, grad_output, input, key, gradients, grad_input, key_partials, begin, end);
  });
  if (key_partials != nullptr) add_rows(key_partials, count * images.blocks(), images.channels, key_total);
}

template <class A>
ImageGradient<A> image_gradient(const State<A>& state, const A* grad_context, const A* scale) {
  double mean = 0;
  for (int64_t c = 0; c < state.channels; ++c) mean += double(grad_context[c]) * double(state.context()[c]);
  return {grad_context, scale, A(mean), *state.largest(), *state.sum()};
}

template <class T>
void narrow_all(const std::vector<double>& values, void* target) {
  if (target == nullptr) return;
  for (size_t k = 0; k < values.size(); ++k) baseline::narrow(acc_t<T>(values[k]), static_cast<T*>(target) + k);
}

// The gradients of the bottleneck's weights from the rows of all images.
template <class T, class A>
void weight_gradients(const Bottleneck& b, int64_t batch, int64_t channels, A* states, const BottleneckRows<A>& rows,
                      const BottleneckGradients& gradients) {
  const int64_t hidden = b.hidden, stride = State<A>::size(channels, hidden);
  const State<A> one{states, channels, hidden};
  const std::vector<A> ones(size_t(batch), A(1));
  auto product = [&](const A* left, int64_t left_stride, int64_t left_size, const A* right, int64_t right_stride,
                     int64_t columns, void* gradient) {
    if (gradient == nullptr) return;
    const int64_t grain = std::max<int64_t>(1, kWorkPerThread / (columns * std::max<int64_t>(batch, 1)));
    parallel_for(left_size, grain, [&](int64_t begin, int64_t end) {
      Buffer scratch(columns * int64_t(sizeof(A)));
      outer(left, left_stride, right, right_stride, batch, columns, static_cast<A*>(scratch.data()),
            static_cast<T*>(gradient), begin, end);
    });
  };
  product(rows.squeezed, hidden, hidden, one.context(), stride, channels, gradients.squeeze_weight);
  product(rows.change, channels, channels, rows.activation, hidden, hidden, gradients.excite_weight);
  product(ones.data(), 1, 1, rows.squeezed, hidden, hidden, gradients.squeeze_bias);
  product(ones.data(), 1, 1, rows.affine, hidden, hidden, gradients.norm_bias);
  product(ones.data(), 1, 1, rows.change, channels, channels, gradients.excite_bias);
  if (gradients.norm_weight == nullptr) return;
  for (int64_t n = 0; n < batch; ++n) {
    const State<A> state{states + n * stride, channels, hidden};
    for (int64_t p = 0; p < hidden; ++p) rows.affine[n * hidden + p] *= state.normalised()[p];
  }
  product(ones.data(), 1, 1, rows.affine, hidden, hidden, gradients.norm_weight);
}

}  // namespace

template <class T>
void pool_backward_cpu(const Images& images, const void* grad_context, const void* input, const void* key_weight,
                       const void* state, void* grad_input, void* grad_key_weight) {
  using A = acc_t<T>;
  const int64_t channels = images.channels, stride = State<A>::pool_size(channels);
  const std::vector<A> key = widened<A, T>(key_weight, channels);
  const std::vector<A> grads = widened<A, T>(grad_context, images.batch * channels);
  const bool key_wanted = grad_key_weight != nullptr;
  Scratch<A> partials(key_wanted ? images.images_per_group * images.blocks() * channels : 0);
  std::vector<double> key_total(size_t(channels), 0.0);
  std::vector<ImageGradient<A>> gradients;
  for (int64_t n = 0; n < images.batch; ++n) {
    const State<A> row{const_cast<A*>(static_cast<const A*>(state)) + n * stride, channels, 0};
    gradients.push_back(image_gradient<A>(row, grads.data() + n * channels, nullptr));
  }
  for_groups(images, [&](int64_t first, int64_t count) {
    const int64_t start = first * images.size();
    gradient_group<T, A>(images, count, nullptr, static_cast<const T*>(input) + start, key.data(),
                         gradients.data() + first,
                         grad_input == nullptr ? nullptr : static_cast<T*>(grad_input) + start,
                         key_wanted ? partials.get() : nullptr, key_total.data());
  });
  narrow_all<T>(key_total, grad_key_weight);
}

template <class T>
void backward_cpu(const Images& images, const Bottleneck& b, const void* grad_output, const void* input,
                  const void* key_weight, const void* state, void* grad_input, void* grad_key_weight,
                  const BottleneckGradients& wanted) {
  using A = acc_t<T>;
  const int64_t channels = images.channels, stride = State<A>::size(channels, b.hidden);
  const std::vector<A> key = widened<A, T>(key_weight, channels);
  A* states = const_cast<A*>(static_cast<const A*>(state));
  const bool multiply = b.fusion == Fusion::multiply;
  Scratch<A> partials(images.images_per_group * images.blocks() * channels);
  Scratch<A> row_memory(images.batch * (2 * channels + 3 * b.hidden));
  BottleneckRows<A> rows{};
  A* next = row_memory.get();
  for (A** row : {&rows.change, &rows.context}) *row = next, next += images.batch * channels;
  for (A** row : {&rows.activation, &rows.affine, &rows.squeezed}) *row = next, next += images.batch * b.hidden;
  std::vector<double> key_total(size_t(channels), 0.0);

  for_groups(images, [&](int64_t first, int64_t count) {
    const int64_t start = first * images.size();
    const T* grad = static_cast<const T*>(grad_output) + start;
    const T* pixels = static_cast<const T*>(input) + start;
    for_blocks(images, count, [&](int64_t begin, int64_t end) {
      total(images, grad, multiply ? pixels : nullptr, partials.get(), begin, end);
    });
    for (int64_t n = 0; n < count; ++n) {
      std::vector<double> sums(size_t(channels), 0.0);
      add_rows(partials.get() + n * images.blocks() * channels, images.blocks(), channels, sums.data());
      std::copy(sums.begin(), sums.end(), rows.change + (first + n) * channels);
    }
    parallel_for(count, std::max<int64_t>(1, kWorkPerThread / (2 * b.hidden * channels)),
                 [&](int64_t begin, int64_t end) {
                   bottleneck_gradients<T>(b, channels, states, rows, first + begin, first + end);
                 });
    std::vector<ImageGradient<A>> gradients;
    for (int64_t n = first; n < first + count; ++n) {
      const State<A> row{states + n * stride, channels, b.hidden};
      gradients.push_back(image_gradient<A>(row, rows.context + n * channels, multiply ? row.change() : nullptr));
    }
    gradient_group<T, A>(images, count, grad, pixels, key.data(), gradients.data(),
                         grad_input == nullptr ? nullptr : static_cast<T*>(grad_input) + start,
                         grad_key_weight == nullptr ? nullptr : partials.get(), key_total.data());
  });
  narrow_all<T>(key_total, grad_key_weight);
  weight_gradients<T>(b, images.batch, channels, states, rows, wanted);
}

#define HDROPS_INSTANTIATE(T)                                                                                          \
  template void pool_cpu<T>(const Images&, const void*, const void*, const void*, void*, void*);                       \
  template void pool_backward_cpu<T>(const Images&, const void*, const void*, const void*, const void*, void*, void*); \
  template void forward_cpu<T>(const Images&, const Bottleneck&, const void*, const void*, const void*, void*, void*); \
  template void backward_cpu<T>(const Images&, const Bottleneck&, const void*, const void*, const void*, const void*,  \
                                void*, void*, const BottleneckGradients&);
HDROPS_INSTANTIATE(float)
HDROPS_INSTANTIATE(double)
HDROPS_INSTANTIATE(bfloat16)
HDROPS_INSTANTIATE(float16)

}  // namespace hdrops::global_context
