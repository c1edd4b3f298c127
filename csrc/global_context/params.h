// Global context (OP-2) as the kernels see it, and the host functions that launch them.
//
// An image of C channels and P pixels is cut into blocks of pixels small enough that a block's second reading comes
// from the level-2 cache; images go through in groups small enough that their last reading comes from a shared cache
// where that is possible at all. Both follow from the shape alone, and a block's sums are added in the order of the
// blocks, so that results do not depend on the number of threads.
//
// Sums and everything computed are in A: float for the 16-bit and 32-bit formats T, double for double.
#pragma once
#include <cstdint>

namespace hdrops::global_context {

constexpr int64_t kMostBlockPixels = 1024;
constexpr int64_t kMostRunPixels = 16384;

// A batch of images, [channels, pixels] or, channels last, [pixels, channels].
struct Images {
  int64_t batch, channels, pixels;
  bool channels_last;
  int64_t block_pixels;      // a multiple of 16 but for an image's last block
  int64_t run_blocks;        // blocks whose pixels are written together
  int64_t images_per_group;  // images that are pooled before the first of them is fused

  int64_t size() const { return channels * pixels; }
  int64_t blocks() const { return (pixels + block_pixels - 1) / block_pixels; }
  int64_t run_pixels() const { return run_blocks * block_pixels; }
  int64_t runs() const { return (pixels + run_pixels() - 1) / run_pixels(); }
};

// Fills in how images of elements of `element_bytes` are cut.
Images cut(int64_t batch, int64_t channels, int64_t pixels, bool channels_last, int64_t element_bytes);

// What the forward pass leaves for the backward, one row for each image: nothing of the image's size.
// context_pool's rows end before `inverse_std`.
template <class A>
struct State {
  A* row;
  int64_t channels, hidden;

  static int64_t pool_size(int64_t channels) { return channels + 2; }
  static int64_t size(int64_t channels, int64_t hidden) { return 2 * channels + hidden + 3; }

  A* context() const { return row; }                         // [C]
  A* largest() const { return row + channels; }              // logit
  A* sum() const { return row + channels + 1; }              // of exp(logit - largest)
  A* inverse_std() const { return row + channels + 2; }      // of the layer norm
  A* normalised() const { return row + channels + 3; }       // [hidden], before the layer norm's affine map
  A* change() const { return row + channels + 3 + hidden; }  // [C], added to or multiplied with the pixels
};

enum class Fusion { add, multiply };

// The bottleneck between context and change: squeeze [hidden, C], layer norm, ReLU, excite [C, hidden].
struct Bottleneck {
  int64_t hidden;
  double eps;
  Fusion fusion;
  const void *squeeze_weight, *squeeze_bias, *norm_weight, *norm_bias, *excite_weight, *excite_bias;
};

// Gradients that are not wanted are null.
struct BottleneckGradients {
  void *squeeze_weight, *squeeze_bias, *norm_weight, *norm_bias, *excite_weight, *excite_bias;
};

// What the gradient of the pixels needs of one image.
template <class A>
struct ImageGradient {
  const A* grad_context;  // G, [C]
  const A* scale;         // of grad_output, [C]; null for 1
  A mean;                 // <G, context>
  A largest, sum;
};

// Gradients inside the bottleneck, a row for each image.
template <class A>
struct BottleneckRows {
  A* change;      // [C]; comes in as the gradient of the change, goes out as that of t
  A* activation;  // h, [hidden]
  A* affine;      // of gamma n + beta, [hidden]
  A* squeezed;    // of z, [hidden]
  A* context;     // G, [C]
};

// Rows of `state` have State::pool_size(channels) elements.
template <class T>
void pool_cpu(const Images& images, const void* input, const void* key_weight, const void* key_bias, void* state,
              void* context);

template <class T>
void pool_backward_cpu(const Images& images, const void* grad_context, const void* input, const void* key_weight,
                       const void* state, void* grad_input, void* grad_key_weight);

template <class T>
void forward_cpu(const Images& images, const Bottleneck& bottleneck, const void* input, const void* key_weight,
                 const void* key_bias, void* state, void* output);

template <class T>
void backward_cpu(const Images& images, const Bottleneck& bottleneck, const void* grad_output, const void* input,
                  const void* key_weight, const void* state, void* grad_input, void* grad_key_weight,
                  const BottleneckGradients& gradients);

}  // namespace hdrops::global_context
