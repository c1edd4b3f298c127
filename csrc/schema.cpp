// Every operator of hdrops, one line each. Shapes and dtypes are checked in Python, where the message can
// say everything (hdrops/ops/<family>.py); the bindings check again what memory safety rests on.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(hdrops, m) {
  // The instruction set the CPU kernels use in this process (common/isa.h), for `hdrops info`.
  m.def("_simd_level() -> int");

  // Deformable convolution, OP-1.
  m.def(
      "deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias, Tensor? mask, SymInt[2] stride, "
      "SymInt[2] padding, SymInt[2] dilation, bool allow_tf32=False) -> Tensor");
  m.def(
      "_deform_conv2d_backward(Tensor grad_output, Tensor input, Tensor offset, Tensor weight, Tensor? mask, "
      "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, bool[5] output_mask, bool deterministic, "
      "bool allow_tf32=False) -> (Tensor grad_input, Tensor grad_offset, Tensor grad_weight, Tensor grad_bias, Tensor "
      "grad_mask)");

  // Patch matching in a local window, OP-3: score and index [N, Hq, Wq], the differentiable one first.
  m.def(
      "patch_match(Tensor query, Tensor key, SymInt[2] radius, Tensor? centers, int patch_size, str normalize) "
      "-> (Tensor score, Tensor index)");
  m.def(
      "_patch_match_backward(Tensor grad_score, Tensor query, Tensor key, Tensor index, int patch_size, "
      "str normalize, bool[2] output_mask, bool deterministic) -> (Tensor grad_query, Tensor grad_key)");

  // Patch swap, OP-4: size is the source's height and width, channels_last the memory format of its gradient.
  m.def("patch_swap(Tensor source, Tensor index, int patch_size, int scale, str border) -> Tensor");
  m.def(
      "_patch_swap_backward(Tensor grad_output, Tensor index, SymInt[2] size, int patch_size, int scale, str border, "
      "bool channels_last, bool deterministic) -> Tensor");

  // Global context, OP-2: weight and key_weight [C], squeeze_weight [P, C], excite_weight [C, P]. `state` is what the
  // backward pass needs beside the inputs, one row for each image (csrc/global_context/params.h).
  m.def("context_pool(Tensor input, Tensor weight, Tensor? bias) -> (Tensor context, Tensor state)");
  m.def(
      "_context_pool_backward(Tensor grad_context, Tensor input, Tensor weight, Tensor state, bool[2] output_mask) "
      "-> (Tensor grad_input, Tensor grad_weight)");
  m.def(
      "global_context(Tensor input, Tensor key_weight, Tensor? key_bias, Tensor squeeze_weight, Tensor squeeze_bias, "
      "Tensor norm_weight, Tensor norm_bias, Tensor excite_weight, Tensor excite_bias, str fusion, float eps) "
      "-> (Tensor output, Tensor state)");
  m.def(
      "_global_context_backward(Tensor grad_output, Tensor input, Tensor key_weight, Tensor squeeze_weight, "
      "Tensor norm_weight, Tensor norm_bias, Tensor excite_weight, Tensor state, str fusion, bool[8] output_mask) "
      "-> (Tensor grad_input, Tensor grad_key_weight, Tensor grad_squeeze_weight, Tensor grad_squeeze_bias, "
      "Tensor grad_norm_weight, Tensor grad_norm_bias, Tensor grad_excite_weight, Tensor grad_excite_bias)");

  // Camera response curves: curve [N|1, C|1, L], input [N, C, P] in memory order (contiguous or channels last).
  m.def("crf_lookup(Tensor input, Tensor curve, str mode, float? gradient_scale) -> Tensor");
  m.def(
      "_crf_lookup_backward(Tensor grad_output, Tensor input, Tensor curve, str mode, float? gradient_scale, "
      "bool[2] output_mask) -> (Tensor grad_input, Tensor grad_curve)");

  // Exposure merging, OP-10: weight [L], curve [N|1, C|1, L] or none for a linear response.
  m.def(
      "merge_exposures(Tensor stack, Tensor log_exposures, Tensor? curve, Tensor weight, Tensor? mask, "
      "bool fallback) -> Tensor");
  m.def(
      "_merge_exposures_backward(Tensor grad_output, Tensor stack, Tensor log_exposures, Tensor? curve, Tensor weight, "
      "Tensor? mask, bool fallback, bool[3] output_mask) "
      "-> (Tensor grad_stack, Tensor grad_log_exposures, Tensor grad_curve)");

  // Response recovery from few samples, the folded system of solve_debevec: lower, fraction, square [B, S, P],
  // strength [L], right and curve [B, L], solved [B].
  m.def(
      "_solve_few_samples(Tensor lower, Tensor? fraction, Tensor square, Tensor strength, Tensor right) "
      "-> (Tensor curve, Tensor solved)");

  // Histogram features, OP-11 and OP-12.
  m.def("tent_histogram(Tensor input, int[] bins) -> Tensor");
  m.def("_tent_histogram_backward(Tensor grad_output, Tensor input, int[] bins) -> Tensor");
  m.def("value_histogram(Tensor input, int bins) -> Tensor");
  m.def("_value_histogram_backward(Tensor grad_output, Tensor input, int bins) -> Tensor");

  // Quantisation with a straight-through gradient, OP-13.
  m.def("quantize_ste(Tensor input, int levels, bool gradient_outside) -> Tensor");
  m.def("_quantize_ste_backward(Tensor grad_output, Tensor input, bool gradient_outside) -> Tensor");

  // Guided-filter truncation, OP-14.
  m.def("truncate(Tensor input, int radius, float eps) -> Tensor");
  m.def("_truncate_backward(Tensor grad_output, Tensor input, int radius, float eps) -> Tensor");
}
