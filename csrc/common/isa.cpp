// Run-time choice of the instruction set, made once per process (see isa.h).
#include "common/isa.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace hdrops {
namespace {

// Whether the processor multiplies tiles of bf16 (AMX) and the system lets this process use them: the state of the
// tiles is large, and Linux saves it only for processes that have asked.
bool may_use_amx() {
#if defined(__x86_64__) && defined(__linux__) && defined(SYS_arch_prctl)
  constexpr unsigned kTiles = 1u << 24, kBf16 = 1u << 22;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of asm/prctl.h, which older headers lack
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kTiles) == 0 || (d & kBf16) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa best_isa() {
#if defined(HDROPS_LOWERED_ISA)
  return Isa::avx512_bf16;  // the wide kernels, lowered by the compiler to what the build machine has: tests only
#elif defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) {
    if (may_use_amx()) return Isa::amx;
    // Intel's bf16 dot products take at least as long as its multiply-adds of the same data, which do not round.
    if (!__builtin_cpu_is("intel")) return Isa::avx512_bf16;
  }
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa choose_isa() {
#if defined(HDROPS_LOWERED_ISA_ONLY)
  return best_isa();  // the only one there is
#endif
  static const char* const names[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};
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
