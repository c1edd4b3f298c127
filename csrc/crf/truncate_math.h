// The truncation process's arithmetic of one pixel (OP-14), for all kernels.
#pragma once
#include "common/hd.h"
#include "crf/truncate_params.h"

namespace hdrops {

// To [0, 1]; NaN stays NaN.
template <class A>
HDROPS_HD A clip_base(A base) {
  A clipped = base < A(0) ? A(0) : base;
  return clipped > A(1) ? A(1) : clipped;
}

// clip(base) * H / (base + smallest)
template <class A>
HDROPS_HD A limit_base(A image, A base) {
  return clip_base(base) * (image / (base + A(kSmallestBase)));
}

// Its gradients.
template <class A>
struct LimitGradient {
  A base, image;
};

template <class A>
HDROPS_HD LimitGradient<A> limit_gradient(A grad, A image, A base) {
  A inverse = A(1) / (base + A(kSmallestBase)), clipped = clip_base(base);
  // 1 - base / (base + smallest), without the cancellation, where nothing is clipped.
  A slope = base >= A(0) && base <= A(1) ? A(kSmallestBase) * inverse : -clipped * inverse;
  return {grad * image * inverse * slope, grad * clipped * inverse};
}

}  // namespace hdrops
