// What the kernels of patch matching and patch swap are told: sizes and pointers, nothing of torch.
//
// All tensors of data have the type T; they are contiguous, or channels last in memory where a flag says so. Indices
// are linear, y * width + x, in the key's grid.
#pragma once
#include <cstdint>

#include "common/hd.h"

namespace hdrops::patch_match {

// A divisor of the score is at least this.
constexpr double kSmallestNorm = 1e-5;
// Displacements of a window are numbered by 32-bit integers.
constexpr int64_t kLargestWindow = INT32_MAX;

// Features [N, C, H, W].
struct Features {
  const void* data;
  int64_t height, width;
  bool channels_last;
  bool normalize;  // the score is divided by the norm of their patches
};

// patch_match (OP-3).
struct MatchParams {
  int64_t batch, channels;
  Features query, key;
  int64_t patch_size;

  // Forward only. The radius is below the key's size: a larger one finds nothing more.
  int64_t radius_y, radius_x;
  const int64_t* centers;  // [N, Hq, Wq], any values; null: each site's own position, in grids of equal size
  int64_t* index;          // [N, Hq, Wq]
  void* score;             // [N, Hq, Wq]

  // Backward only; a null gradient is not computed. Gradients lie in memory as what they are the gradient of.
  const int64_t* match;    // [N, Hq, Wq], any values
  const void* grad_score;  // [N, Hq, Wq]
  void* grad_query;
  void* grad_key;
  bool deterministic;  // for the CUDA kernels

  int64_t reach() const { return patch_size / 2; }
  int64_t sites() const { return query.height * query.width; }
  int64_t window_x() const { return 2 * radius_x + 1; }
  int64_t window_y() const { return 2 * radius_y + 1; }
  // Multiply-adds of a forward pass where sums over patches are shared.
  int64_t work() const { return batch * sites() * channels * (window_x() * window_y() + 4); }
  int64_t backward_work() const { return batch * sites() * channels * 3 * (patch_size * patch_size + 4); }
};

// patch_swap (OP-4), forward and backward. Sites are the match's; each stands for scale x scale pixels.
struct SwapParams {
  int64_t batch, channels;
  int64_t query_height, query_width;  // sites of the output
  int64_t key_height, key_width;      // sites of the source
  int64_t patch_size, scale;
  bool exclude_border;   // divide by the patches that overlap, not by patch_size^2
  const int64_t* index;  // [N, Hq, Wq], any values
  const void* input;     // source [N, C, scale * Hk, scale * Wk]; backward: the output's gradient
  void* output;          // [N, C, scale * Hq, scale * Wq]; backward: the source's gradient
  bool input_channels_last, output_channels_last;

  int64_t reach() const { return patch_size / 2; }
  // Multiply-adds of a pass.
  int64_t work() const {
    return batch * query_height * query_width * channels * scale * scale * (patch_size * patch_size + 4);
  }
};

// The work a thread of the CPU kernels should have, in multiply-adds: some 100 microseconds.
constexpr int64_t kWorkPerThread = int64_t(1) << 20;

// The CPU kernels; T is float, double, bfloat16 or float16.
template <class T>
void match_cpu(const MatchParams& params);
template <class T>
void match_backward_cpu(const MatchParams& params);
template <class T>
void swap_cpu(const SwapParams& params);
template <class T>
void swap_backward_cpu(const SwapParams& params);

}  // namespace hdrops::patch_match
