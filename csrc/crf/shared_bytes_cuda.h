// How much shared memory the current device has.
#pragma once
#include <cstdint>

#include "common/launch.h"

namespace hdrops {

// Shared memory that a block may ask for, of what a multiprocessor has but for 1 KB that each block costs.
inline int64_t shared_bytes_per_block() {
  const int capability = device_compute_capability();
  if (capability < 80) return 64 << 10;
  if (capability == 80 || capability == 87) return 163 << 10;
  return capability >= 90 && capability < 110 ? 227 << 10 : 99 << 10;
}

}  // namespace hdrops
