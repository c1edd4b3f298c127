// Which instruction set the CPU kernels use. One wheel serves every machine, so each kernel source is compiled once
// per set (foreach_isa.h) and the best one that the processor has is taken at run time. HDROPS_SIMD=baseline|avx2|
// avx512|avx512_bf16|amx in the environment asks for a lower one; a set the processor lacks is never taken.
#pragma once

namespace hdrops {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

Isa isa();

}  // namespace hdrops
