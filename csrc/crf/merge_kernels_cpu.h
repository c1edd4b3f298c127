// Everything of exposure merging that is compiled per instruction set (merge_cpu.cpp), in order of dependence.
// clang-format off
#include "common/vmath.h"
#include "crf/lookup_vector.h"
#include "crf/merge_readings_cpu.h"
#include "crf/merge_codes_cpu.h"
#include "crf/merge_block_cpu.h"
#include "crf/merge_forward_cpu.h"
#include "crf/merge_backward_cpu.h"
