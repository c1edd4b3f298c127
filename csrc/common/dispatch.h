// From a tensor's dtype to the kernels' storage type: dispatch_floating(dtype, "op", [&]<class T>() { ... }).
// Bindings only; kernels know nothing of torch.
#pragma once
#include <torch/headeronly/core/ScalarType.h>

#include "common/check.h"
#include "common/half.h"

namespace hdrops {

using torch::headeronly::ScalarType;

template <class F>
auto dispatch_floating(ScalarType dtype, const char* op, F&& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body.template operator()<float>();
    case ScalarType::Double:
      return body.template operator()<double>();
    case ScalarType::BFloat16:
      return body.template operator()<bfloat16>();
    case ScalarType::Half:
      return body.template operator()<float16>();
    default:
      fail(op, ": dtype must be float32, float64, bfloat16 or float16, got scalar type ", int(dtype));
  }
}

// The type sums and coordinates are kept in.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using acc_t = typename Accumulate<T>::type;

}  // namespace hdrops
