// The emulated kernels of truncate, on addresses of memory that the tests own: what csrc/crf/truncate_bindings.h is for
// torch. The workspace begins as NaN and is of the size asked for, to the byte.
#include "arrays.h"
#include "crf/truncate_cuda.cuh"

namespace hdrops {
namespace {

// sizes: planes, height, width, step. grad_output 0 for the forward pass. Returns the workspace's bytes.
size_t truncate(const std::string& dtype, const std::array<int64_t, 4>& sizes, int64_t radius, double eps,
                uintptr_t input, uintptr_t grad_output, uintptr_t output) {
  const TruncateParams p{sizes[0], sizes[1], sizes[2], sizes[3], radius, eps, 0};
  return emulator::with_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    std::vector<unsigned char> workspace(truncate_workspace_bytes<T>(p, grad_output != 0), 0xff);
    truncate_cuda<T>(p, reinterpret_cast<const T*>(input), reinterpret_cast<const T*>(grad_output),
                     reinterpret_cast<T*>(output), workspace.data(), nullptr);
    return workspace.size();
  });
}

REGISTER_FAMILY(module) { module.def("truncate", &truncate); }

}  // namespace
}  // namespace hdrops
