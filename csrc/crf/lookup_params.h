// What the lookup kernels are told (OP-6, OP-8; codes of 8 and 16 bits index the curve directly).
#pragma once
#include "crf/lookup_layout.h"

namespace hdrops {

struct LookupParams {
  CurveLayout layout;
  int64_t levels;
  bool linear;              // float input: linear or nearest
  double gradient_scale;    // of the nearest slope
  const void* curve;        // [curves, levels], in the accumulation type
  const void* input;        // In
  void* output;             // forward: Out
  const void* grad_output;  // backward: Out
  void* grad_input;         // Out, or null where it is not wanted
  void* grad_curve;         // [curves, levels] in the accumulation type, or null where it is not wanted
};

// Codes of 8 and 16 bits: integer pixels.
template <class In>
constexpr bool kIsCode = false;
template <>
inline constexpr bool kIsCode<uint8_t> = true;
template <>
inline constexpr bool kIsCode<uint16_t> = true;

// The types a kernel is compiled for, as an argument.
template <bool Linear, class In, class Out>
struct LookupTypes {};

// In = Out for floating pixels; In = uint8_t or uint16_t with levels = 256 or 65536 for codes.
template <class In, class Out>
void crf_lookup_cpu(const LookupParams& p);
template <class In, class Out>
void crf_lookup_backward_cpu(const LookupParams& p);

}  // namespace hdrops
