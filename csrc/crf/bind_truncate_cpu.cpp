// Binds the CPU kernels of truncate (truncate_bindings.h).
#include <algorithm>

#include "crf/truncate_bindings.h"
#include "crf/truncate_cpu.h"

namespace hdrops {
namespace {

struct Cpu {
  explicit Cpu(const Tensor&) {}

  template <class T>
  void run(TruncateParams p, const T* input, const T* grad_output, T* output) {
    p.rows_per_task = std::max<int64_t>(64, 16 * p.radius);  // its halo, up to 8 radius rows, is computed twice
    truncate_cpu<T>(p, input, grad_output, output);
  }
};

}  // namespace
}  // namespace hdrops

STABLE_TORCH_LIBRARY_IMPL(hdrops, CPU, m) {
  m.impl("truncate", TORCH_BOX(&hdrops::truncate_forward<hdrops::Cpu>));
  m.impl("_truncate_backward", TORCH_BOX(&hdrops::truncate_backward<hdrops::Cpu>));
}
