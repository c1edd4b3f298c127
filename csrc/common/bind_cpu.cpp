// Operators that belong to no family.
#include <torch/csrc/stable/library.h>

#include "common/isa.h"

namespace {

int64_t simd_level() { return int64_t(hdrops::isa()); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hdrops, CompositeExplicitAutograd, m) { m.impl("_simd_level", TORCH_BOX(&simd_level)); }
