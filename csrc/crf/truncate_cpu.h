// The truncation process on the CPU.
#pragma once
#include "crf/truncate_params.h"

namespace hdrops {

// The result into `output`, or with `grad_output` (else null) the input's gradient.
template <class T>
void truncate_cpu(const TruncateParams& params, const T* input, const T* grad_output, T* output);

}  // namespace hdrops
