// What the quantisation kernels are told (OP-13).
#pragma once
#include <cstdint>

namespace hdrops {

struct QuantizeParams {
  int64_t count;
  int64_t levels;
  bool gradient_outside;  // whether the gradient passes outside [0, 1] too
  const void* input;
  void* output;             // forward
  const void* grad_output;  // backward
  void* grad_input;
};

template <class T>
void quantize_ste_cpu(const QuantizeParams& p);
template <class T>
void quantize_ste_backward_cpu(const QuantizeParams& p);

}  // namespace hdrops
