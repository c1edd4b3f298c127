// Exposure merging (OP-10) as the kernels see it: frames where they lie in memory, in order of exposure, and the
// response and weights as tables. Prepared by merge_plan.h.
#pragma once
#include <cstdint>

namespace hdrops {

// In integer codes, the number of levels of a table that has one entry for each.
constexpr int kCodes8 = 256;
// Terms a table has for each code: w and w ln g.
constexpr int kCodeTerms = 2;
constexpr double kSmallestResponse = 1e-7;
constexpr double kNoWeight = 1e-4;
constexpr double kMergeEpsilon = 1e-9;

// The largest reading.
template <class T>
constexpr double kMergeMax = 1;
template <>
inline constexpr double kMergeMax<uint8_t> = 255;
template <>
inline constexpr double kMergeMax<uint16_t> = 65535;

enum class MergeMask : int { none, boolean, real };

// A is the type sums are kept in, float or double. A stride of an optional dimension is 0 where it has size 1.
template <class A>
struct MergeParams {
  int64_t batch, frames, channels, pixels;
  bool interleaved;  // a frame is [pixels, channels] in memory, else [channels, pixels]
  bool fallback;

  const void* stack;
  int64_t stack_stride_n, stack_stride_p;

  // Frames in order of exposure: [N|1, P] each.
  const int32_t* order;
  const A* log_exposures;
  int64_t exposure_stride_n;
  bool tied;  // some two frames of one image have one exposure

  // Inverse response, every entry positive: [N|1, C|1, L]; null for the linear one.
  const A* curve;
  int64_t curve_length, curve_stride_n, curve_stride_c;

  const A* weight;  // [weight_length]
  int64_t weight_length;
  A hinge[3];  // of a weight table of at most 3 entries: its first value and its two rises

  const void* mask;  // [N|1, P, pixels]
  MergeMask mask_kind;
  int64_t mask_stride_n;

  // 8-bit codes only. ln g: [N|1, C|1, 256]; weights: [256]; terms: [N|1, C|1, 256, kCodeTerms].
  const A* log_curve;
  int64_t log_curve_stride_n, log_curve_stride_c;
  const A* code_weight;
  const A* table;
  int64_t table_stride_n, table_stride_c;
  bool only_ends_clip;  // every code but 0 and 255 has more than kNoWeight
};

// The gradients as the caller gets them; null where not wanted.
template <class A>
struct MergeOutputs {
  void* stack;       // [N, P, frame], dense
  A* log_exposures;  // [N|1, P]
  A* curve;          // [N|1, C|1, L]
};

// What the CPU's backward pass writes; null where not wanted.
struct MergeGradients {
  void* stack;            // [N, P, frame], dense
  double* log_exposures;  // [tasks, P], partial sums
  double* curve;          // [tasks, C|1 of the task's stream, L], partial sums
};

// How the work is cut, by shape alone, so that no result depends on the number of threads. A stream is what lies
// contiguous in the output and has one set of tables: a plane, or an image of interleaved pixels.
struct MergeTasks {
  int64_t streams, stream_length, task_length, tasks_per_stream;
  int64_t count() const { return streams * tasks_per_stream; }
};

}  // namespace hdrops
