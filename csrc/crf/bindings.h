// The bindings of crf_lookup, tent_histogram, value_histogram and quantize_ste for any device: checks, memory layout,
// outputs. The kernels see an image as [N, C, P], planar or interleaved (channels last); any other strides are copied
// to planar. bind_cpu.cpp and bind_cuda.cu register them, each with its Backend, an object of one call:
//
//   explicit Backend(const Tensor& input)     makes the input's device the current one
//   void allocated(const Tensor&) const       is told of a large output before it is written
//   void lookup<In, Out>(const LookupParams&), lookup_backward, tents<T>, ...   runs the kernels
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "crf/histogram_params.h"
#include "crf/lookup_params.h"
#include "crf/quantize_params.h"

namespace hdrops {

using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;

inline bool is_channels_last_of_any(const Tensor& tensor) {
  int64_t dims = tensor.dim(), expected = 1;
  if (dims != 4 && dims != 5) return false;
  for (int64_t i = 0; i < dims; ++i) {
    int64_t dim = i == 0 ? 1 : i == dims - 1 ? 0 : dims - i;  // 1, then from the last to 2, then 0
    if (tensor.size(dim) == 1) continue;
    if (tensor.stride(dim) != expected) return false;
    expected *= tensor.size(dim);
  }
  return true;
}

// A tensor [N, C, ...] in one of the two layouts the kernels know; with fewer than two dimensions, one channel.
struct Image {
  Tensor tensor;
  MemoryFormat format = MemoryFormat::Contiguous;
  int64_t n = 1, c = 1, p = 1;

  bool interleaved() const { return format != MemoryFormat::Contiguous; }
};

inline Image as_image(const Tensor& tensor) {
  Image image{tensor};
  if (!tensor.is_contiguous()) {
    if (is_channels_last_of_any(tensor)) {
      image.format = tensor.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
    } else {
      image.tensor = torch::stable::contiguous(tensor);
    }
  }
  if (tensor.dim() >= 2) {
    image.n = tensor.size(0);
    image.c = tensor.size(1);
  }
  for (int64_t dim = tensor.dim() >= 2 ? 2 : 0; dim < tensor.dim(); ++dim) image.p *= tensor.size(dim);
  return image;
}

// A fresh tensor in the image's layout.
template <class Backend>
Tensor empty_in_layout(const Backend& backend, const Image& image, const std::vector<int64_t>& sizes,
                       ScalarType dtype) {
  Tensor fresh = torch::stable::empty(sizes, dtype, std::nullopt, image.tensor.device(), std::nullopt, image.format);
  backend.allocated(fresh);
  return fresh;
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

inline Tensor nothing(const Tensor& like, ScalarType dtype) { return torch::stable::new_empty(like, {0}, dtype); }

inline void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& input) {
  HDROPS_CHECK(tensor.device() == input.device(), op, ": ", name, " must be on input's device");
}

inline void check_gradient(const char* op, const Tensor& grad_output, const Tensor& input,
                           const std::vector<int64_t>& sizes) {
  HDROPS_CHECK(sizes_of(grad_output) == sizes, op, ": grad_output has a wrong shape");
  check_device(op, "grad_output", grad_output, input);
}

// From the dtypes of pixels and curve to the kernels' types: f.template operator()<In, Out>().
template <class F>
auto dispatch_lookup(ScalarType input, ScalarType curve, const char* op, F&& f) {
  return dispatch_floating(input == ScalarType::Byte || input == ScalarType::UInt16 ? curve : input, op,
                           [&]<class T>() {
                             if (input == ScalarType::Byte) return f.template operator()<uint8_t, T>();
                             if (input == ScalarType::UInt16) return f.template operator()<uint16_t, T>();
                             return f.template operator()<T, T>();
                           });
}

inline bool is_code(ScalarType dtype) { return dtype == ScalarType::Byte || dtype == ScalarType::UInt16; }

inline ScalarType accumulation_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

struct Lookup {
  Image image;
  Tensor curve;  // in the accumulation type
  ScalarType out;
  LookupParams params;
};

inline Lookup prepare_lookup(const char* op, const Tensor& input, const Tensor& curve, const std::string& mode,
                             std::optional<double> gradient_scale) {
  Lookup lookup{as_image(input), curve, {}, {}};
  Image& image = lookup.image;
  ScalarType in = input.scalar_type();
  check_device(op, "curve", curve, input);
  HDROPS_CHECK(curve.dim() == 3 && curve.size(2) >= 2, op, ": curve must be [N or 1, C or 1, levels >= 2]");
  HDROPS_CHECK(curve.size(0) == 1 || (input.dim() >= 2 && curve.size(0) == image.n), op, ": curve has ", curve.size(0),
               " images, input ", image.n);
  HDROPS_CHECK(curve.size(1) == 1 || (input.dim() >= 2 && curve.size(1) == image.c), op, ": curve has ", curve.size(1),
               " channels, input ", image.c);
  HDROPS_CHECK(mode == "linear" || mode == "nearest", op, ": mode must be linear or nearest, got ", mode);
  lookup.out = is_code(in) ? curve.scalar_type() : in;
  int64_t levels = curve.size(2);
  if (is_code(in)) {
    int64_t codes = in == ScalarType::Byte ? 256 : 65536;
    HDROPS_CHECK(levels == codes, op, ": a curve for these codes has ", codes, " levels, got ", levels);
  }
  HDROPS_CHECK(levels <= int64_t(1) << 20, op, ": a curve has at most 2^20 levels, got ", levels);
  lookup.curve = torch::stable::contiguous(torch::stable::to(curve, accumulation_type(lookup.out)));
  bool fits = image.c * levels <= INT32_MAX / 8;  // a lane's place in the tables of an interleaved group is 32 bits
  if (image.interleaved() && curve.size(1) > 1 && !fits) {
    image.tensor = torch::stable::contiguous(input);
    image.format = MemoryFormat::Contiguous;
  }
  LookupParams& p = lookup.params;
  p = {};
  p.layout = curve_layout(image.n, image.c, image.p, image.interleaved(), curve.size(0), curve.size(1));
  p.levels = levels;
  p.linear = mode == "linear";
  p.gradient_scale = gradient_scale.value_or(double(levels - 1));
  p.curve = lookup.curve.const_data_ptr();
  p.input = image.tensor.const_data_ptr();
  return lookup;
}

template <class Backend>
Tensor crf_lookup(const Tensor& input, const Tensor& curve, std::string mode, std::optional<double> gradient_scale) {
  const char* op = "crf_lookup";
  Lookup lookup = prepare_lookup(op, input, curve, mode, gradient_scale);
  Backend backend(input);
  Tensor output = empty_in_layout(backend, lookup.image, sizes_of(input), lookup.out);
  if (output.numel() == 0) return output;
  lookup.params.output = output.mutable_data_ptr();
  dispatch_lookup(input.scalar_type(), curve.scalar_type(), op,
                  [&]<class In, class Out>() { backend.template lookup<In, Out>(lookup.params); });
  return output;
}

template <class Backend>
std::tuple<Tensor, Tensor> crf_lookup_backward(const Tensor& grad_output, const Tensor& input, const Tensor& curve,
                                               std::string mode, std::optional<double> gradient_scale,
                                               std::vector<bool> output_mask) {
  const char* op = "_crf_lookup_backward";
  Lookup lookup = prepare_lookup(op, input, curve, mode, gradient_scale);
  check_gradient(op, grad_output, input, sizes_of(input));
  HDROPS_CHECK(grad_output.scalar_type() == lookup.out, op, ": grad_output must have the output's dtype");
  HDROPS_CHECK(output_mask.size() == 2, op, ": output_mask has 2 entries");
  bool of_input = output_mask[0] && !is_code(input.scalar_type()), of_curve = output_mask[1];
  ScalarType accumulation = accumulation_type(lookup.out);
  Backend backend(input);
  Tensor grad_input =
      of_input ? empty_in_layout(backend, lookup.image, sizes_of(input), lookup.out) : nothing(input, lookup.out);
  Tensor grad_curve = nothing(input, accumulation);
  if (of_curve) {
    grad_curve = input.numel() == 0 ? torch::stable::new_zeros(lookup.curve, curve.sizes())
                                    : torch::stable::new_empty(lookup.curve, curve.sizes());
  }
  if (input.numel() > 0 && (of_input || of_curve)) {
    Tensor grad = torch::stable::contiguous(grad_output, lookup.image.format);
    lookup.params.grad_output = grad.const_data_ptr();
    lookup.params.grad_input = of_input ? grad_input.mutable_data_ptr() : nullptr;
    lookup.params.grad_curve = of_curve ? grad_curve.mutable_data_ptr() : nullptr;
    dispatch_lookup(input.scalar_type(), curve.scalar_type(), op,
                    [&]<class In, class Out>() { backend.template lookup_backward<In, Out>(lookup.params); });
  }
  return {grad_input, torch::stable::to(grad_curve, curve.scalar_type())};
}

inline TentParams prepare_tents(const char* op, const Image& image, const std::vector<int64_t>& bins) {
  HDROPS_CHECK(image.tensor.dim() == 4, op, ": input must be [N, C, H, W]");
  TentParams p{};
  p.n = image.n;
  p.c = image.c;
  p.p = image.p;
  p.interleaved = image.interleaved();
  p.bins = bins.data();
  p.bin_count = int64_t(bins.size());
  for (int64_t bin : bins) {
    HDROPS_CHECK(bin >= 1 && bin <= 1 << 16, op, ": bins must lie in [1, 65536], got ", bin);
    p.tents += bin + 1;
  }
  p.input = image.tensor.const_data_ptr();
  return p;
}

inline std::vector<int64_t> tent_sizes(const Tensor& input, const TentParams& p) {
  return {p.n, p.tents * p.c, input.size(2), input.size(3)};
}

template <class Backend>
Tensor tent_histogram(const Tensor& input, std::vector<int64_t> bins) {
  const char* op = "tent_histogram";
  Image image = as_image(input);
  TentParams p = prepare_tents(op, image, bins);
  Backend backend(input);
  Tensor output = empty_in_layout(backend, image, tent_sizes(input, p), input.scalar_type());
  if (output.numel() == 0) return output;
  p.output = output.mutable_data_ptr();
  dispatch_floating(input.scalar_type(), op, [&]<class T>() { backend.template tents<T>(p); });
  return output;
}

template <class Backend>
Tensor tent_histogram_backward(const Tensor& grad_output, const Tensor& input, std::vector<int64_t> bins) {
  const char* op = "_tent_histogram_backward";
  Image image = as_image(input);
  TentParams p = prepare_tents(op, image, bins);
  check_gradient(op, grad_output, input, tent_sizes(input, p));
  HDROPS_CHECK(grad_output.scalar_type() == input.scalar_type(), op, ": grad_output must have the input's dtype");
  Backend backend(input);
  Tensor grad_input = empty_in_layout(backend, image, sizes_of(input), input.scalar_type());
  if (input.numel() == 0) return grad_input;
  Tensor grad = torch::stable::contiguous(grad_output, image.format);
  p.grad_output = grad.const_data_ptr();
  p.grad_input = grad_input.mutable_data_ptr();
  dispatch_floating(input.scalar_type(), op, [&]<class T>() { backend.template tents_backward<T>(p); });
  return grad_input;
}

inline ValueHistogramParams prepare_histogram(const char* op, Image& image, int64_t bins) {
  HDROPS_CHECK(image.tensor.dim() >= 2, op, ": input must be [N, C, ...]");
  HDROPS_CHECK(bins >= 2 && bins <= 1 << 16, op, ": bins must lie in [2, 65536], got ", bins);
  if (image.interleaved() && image.c * bins > INT32_MAX / 8) {
    image.tensor = torch::stable::contiguous(image.tensor);
    image.format = MemoryFormat::Contiguous;
  }
  ValueHistogramParams p{};
  p.layout = image.interleaved() ? CurveLayout{image.n, image.c, 1, image.c * image.p, 0}
                                 : CurveLayout{image.n * image.c, 1, 1, image.p, 0};
  p.bins = bins;
  p.input = image.tensor.const_data_ptr();
  return p;
}

template <class Backend>
Tensor value_histogram(const Tensor& input, int64_t bins) {
  const char* op = "value_histogram";
  Image image = as_image(input);
  ValueHistogramParams p = prepare_histogram(op, image, bins);
  Backend backend(input);
  Tensor output = torch::stable::new_empty(input, {image.n, image.c, bins});
  if (output.numel() == 0) return output;
  p.output = output.mutable_data_ptr();
  dispatch_floating(input.scalar_type(), op, [&]<class T>() { backend.template values<T>(p); });
  return output;
}

template <class Backend>
Tensor value_histogram_backward(const Tensor& grad_output, const Tensor& input, int64_t bins) {
  const char* op = "_value_histogram_backward";
  Image image = as_image(input);
  ValueHistogramParams p = prepare_histogram(op, image, bins);
  check_gradient(op, grad_output, input, {image.n, image.c, bins});
  HDROPS_CHECK(grad_output.scalar_type() == input.scalar_type(), op, ": grad_output must have the input's dtype");
  Backend backend(input);
  Tensor grad_input = empty_in_layout(backend, image, sizes_of(input), input.scalar_type());
  if (input.numel() == 0) return grad_input;
  Tensor grad = torch::stable::contiguous(grad_output);
  p.grad_output = grad.const_data_ptr();
  p.grad_input = grad_input.mutable_data_ptr();
  dispatch_floating(input.scalar_type(), op, [&]<class T>() { backend.template values_backward<T>(p); });
  return grad_input;
}

inline QuantizeParams prepare_quantize(const Image& image, int64_t levels, bool gradient_outside) {
  QuantizeParams p{};
  p.count = image.tensor.numel();
  p.levels = levels;
  p.gradient_outside = gradient_outside;
  p.input = image.tensor.const_data_ptr();
  return p;
}

template <class Backend>
Tensor quantize_ste(const Tensor& input, int64_t levels, bool gradient_outside) {
  const char* op = "quantize_ste";
  HDROPS_CHECK(levels >= 2 && levels <= 1 << 16, op, ": levels must lie in [2, 65536], got ", levels);
  Image image = as_image(input);
  QuantizeParams p = prepare_quantize(image, levels, gradient_outside);
  Backend backend(input);
  Tensor output = empty_in_layout(backend, image, sizes_of(input), input.scalar_type());
  if (output.numel() == 0) return output;
  p.output = output.mutable_data_ptr();
  dispatch_floating(input.scalar_type(), op, [&]<class T>() { backend.template quantize<T>(p); });
  return output;
}

template <class Backend>
Tensor quantize_ste_backward(const Tensor& grad_output, const Tensor& input, bool gradient_outside) {
  const char* op = "_quantize_ste_backward";
  Image image = as_image(input);
  check_gradient(op, grad_output, input, sizes_of(input));
  HDROPS_CHECK(grad_output.scalar_type() == input.scalar_type(), op, ": grad_output must have the input's dtype");
  QuantizeParams p = prepare_quantize(image, 0, gradient_outside);
  Backend backend(input);
  Tensor grad_input = empty_in_layout(backend, image, sizes_of(input), input.scalar_type());
  if (input.numel() == 0) return grad_input;
  Tensor grad = torch::stable::contiguous(grad_output, image.format);
  p.grad_output = grad.const_data_ptr();
  p.grad_input = grad_input.mutable_data_ptr();
  dispatch_floating(input.scalar_type(), op, [&]<class T>() { backend.template quantize_backward<T>(p); });
  return grad_input;
}

}  // namespace hdrops
