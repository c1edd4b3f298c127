// Everything of global context that is compiled per instruction set (global_context_cpu.cpp), in order of dependence.
// clang-format off
#include "common/vmath.h"
#include "common/streaming.h"
#include "global_context/planar_cpu.h"
#include "global_context/interleaved_cpu.h"
#include "global_context/blocks_cpu.h"
#include "global_context/bottleneck_cpu.h"
