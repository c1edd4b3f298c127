// The backward pass of deformable convolution on the CPU, what it does with a tile's samples of one tap and offset
// group: dot products of their cells' corners with the columns' gradient, and the scatter of that gradient to the
// corners. Included inside foreach_isa.h's sources, after gemm.h; no include guard.
//
// Both run along the channels of a pixel, a plan's row after the other, in the vectors that Channels has chosen.
#include "deform_conv2d/plan.h"

namespace hdrops {
namespace HDROPS_ISA {

// Samples of a tile that the main pass left out, one bit each.
struct FarSamples {
  uint64_t bits[2];
};
static_assert(kMaxTile <= 128);

// dots[k][i] = <plane[corner k of row i], gradient[i]> over the channels of one offset group.
template <int kWidth, class T, class Index, class Real>
void dot_vectors(const T* plane, const Plan<Real, Index>& plan, int64_t rows, int64_t width, const Real* gradient,
                 int64_t stride, Real (*dots)[kMaxTile]) {
  for (int64_t i = 0; i < rows; ++i, gradient += stride) {
    vec<Real, kWidth> sum00{}, sum01{}, sum10{}, sum11{};
    if (plan.corner[0][i] >= 0) {
      const T *x00 = plane + plan.corner[0][i], *x01 = plane + plan.corner[1][i];
      const T *x10 = plane + plan.corner[2][i], *x11 = plane + plan.corner[3][i];
      for (int64_t c = 0; c < width; c += kWidth) {
        auto g = load<kWidth>(gradient + c);
        sum00 += g * load_wide<kWidth>(x00 + c);
        sum01 += g * load_wide<kWidth>(x01 + c);
        sum10 += g * load_wide<kWidth>(x10 + c);
        sum11 += g * load_wide<kWidth>(x11 + c);
      }
    }
    reduce_four<Real, kWidth>(sum00, sum01, sum10, sum11, dots[0] + i, dots[1] + i, dots[2] + i, dots[3] + i);
  }
}

// plane[corner k of row i] += weight[k][i] * gradient[i] where the row may be written; returns the rows left out.
template <int kWidth, class Index, class Real>
FarSamples scatter_vectors(Real* plane, const Plan<Real, Index>& plan, int64_t rows, int64_t width,
                           const Real* gradient, int64_t stride) {
  FarSamples far{};
  for (int64_t i = 0; i < rows; ++i, gradient += stride) {
    if (plan.target[i] < 0) {
      far.bits[i / 64] |= uint64_t(plan.corner[0][i] >= 0) << (i % 64);
      continue;
    }
    Real *x00 = plane + plan.corner[0][i], *x01 = plane + plan.corner[1][i];
    Real *x10 = plane + plan.corner[2][i], *x11 = plane + plan.corner[3][i];
    auto w00 = splat<kWidth>(plan.weight[0][i]), w01 = splat<kWidth>(plan.weight[1][i]);
    auto w10 = splat<kWidth>(plan.weight[2][i]), w11 = splat<kWidth>(plan.weight[3][i]);
    for (int64_t c = 0; c < width; c += kWidth) {  // one corner after the other: at the border two may be the same
      auto g = load<kWidth>(gradient + c);
      store<kWidth>(x00 + c, load<kWidth>(x00 + c) + w00 * g);
      store<kWidth>(x01 + c, load<kWidth>(x01 + c) + w01 * g);
      store<kWidth>(x10 + c, load<kWidth>(x10 + c) + w10 * g);
      store<kWidth>(x11 + c, load<kWidth>(x11 + c) + w11 * g);
    }
  }
  return far;
}

template <class T, class Index, class Real>
void dot(const Channels& channels, const T* plane, const Plan<Real, Index>& plan, int64_t rows, const Real* gradient,
         int64_t stride, Real (*dots)[kMaxTile]) {
  constexpr int full = kLanes<Real>, half = full / 2;
  if (channels.lanes == full) {
    dot_vectors<full>(plane, plan, rows, channels.padded, gradient, stride, dots);
  } else if (channels.lanes == half) {
    dot_vectors<half>(plane, plan, rows, channels.padded, gradient, stride, dots);
  } else {
    dot_vectors<1>(plane, plan, rows, channels.padded, gradient, stride, dots);
  }
}

template <class Index, class Real>
FarSamples scatter(const Channels& channels, Real* plane, const Plan<Real, Index>& plan, int64_t rows,
                   const Real* gradient, int64_t stride) {
  constexpr int full = kLanes<Real>, half = full / 2;
  if (channels.lanes == full) return scatter_vectors<full>(plane, plan, rows, channels.padded, gradient, stride);
  if (channels.lanes == half) return scatter_vectors<half>(plane, plan, rows, channels.padded, gradient, stride);
  return scatter_vectors<1>(plane, plan, rows, channels.padded, gradient, stride);
}

}  // namespace HDROPS_ISA
}  // namespace hdrops
