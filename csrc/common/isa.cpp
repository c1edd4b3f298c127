// Run-time choice of the instruction set, made once per process (see isa.h).
#include "common/isa.h"

#include <cstdlib>
#include <cstring>

namespace hdrops {
namespace {

Isa best_isa() {
#if defined(HDROPS_LOWERED_ISA)
  return Isa::avx512_bf16;  // the wide kernels, lowered by the compiler to what the build machine has: tests only
#elif defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512_bf16;
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa choose_isa() {
#if defined(HDROPS_LOWERED_ISA_ONLY)
  return best_isa();  // the only one there is
#endif
  static const char* const names[] = {"baseline", "avx2", "avx512", "avx512_bf16"};
  Isa best = best_isa();
  const char* wanted = std::getenv("HDROPS_SIMD");
  if (wanted == nullptr) return best;
  for (int level = 0; level < int(best); ++level) {
    if (std::strcmp(wanted, names[level]) == 0) return Isa(level);
  }
  return best;
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

}  // namespace hdrops
