// Entry points of the emulated response-curve kernels: what csrc/crf/bindings.h is for torch, on addresses of memory
// that the tests own.
#include "addresses.h"
#include "crf/histogram_cuda.cuh"
#include "crf/lookup_cuda.cuh"
#include "crf/quantize_cuda.cuh"

namespace hdrops {
namespace {

using emulator::Address;
using emulator::at;
using emulator::with_pixels;
using emulator::with_type;
using emulator::Workspace;

// n, c, p, interleaved, then the curve's images and channels.
using Geometry = std::array<int64_t, 6>;

LookupParams lookup_params(const Geometry& g, int64_t levels, bool linear, double gradient_scale, Address curve,
                           Address input) {
  LookupParams p{};
  p.layout = curve_layout(g[0], g[1], g[2], g[3] != 0, g[4], g[5]);
  p.levels = levels;
  p.linear = linear;
  p.gradient_scale = gradient_scale;
  p.curve = at(curve);
  p.input = at(input);
  return p;
}

void lookup(const std::string& in, const std::string& out, const Geometry& g, int64_t levels, bool linear,
            Address curve, Address input, Address output) {
  LookupParams p = lookup_params(g, levels, linear, 0, curve, input);
  p.output = at(output);
  with_pixels(in, out, [&](auto in_tag, auto out_tag) {
    crf_lookup_cuda<typename decltype(in_tag)::type, typename decltype(out_tag)::type>(p, nullptr);
  });
}

void lookup_backward(const std::string& in, const std::string& out, const Geometry& g, int64_t levels, bool linear,
                     double gradient_scale, Address curve, Address input, Address grad_output, Address grad_input,
                     Address grad_curve) {
  LookupParams p = lookup_params(g, levels, linear, gradient_scale, curve, input);
  p.grad_output = at(grad_output);
  p.grad_input = at(grad_input);
  p.grad_curve = at(grad_curve);
  with_pixels(in, out, [&](auto in_tag, auto out_tag) {
    using In = typename decltype(in_tag)::type;
    using Out = typename decltype(out_tag)::type;
    const Workspace workspace(crf_lookup_backward_workspace_bytes<In, Out>(p));
    crf_lookup_backward_cuda<In, Out>(p, workspace.get(), nullptr);
  });
}

// n, c, p, interleaved. grad_output and grad_input instead of output for the backward pass.
void tents(const std::string& dtype, const std::array<int64_t, 4>& g, const std::vector<int64_t>& bins, Address input,
           Address output, Address grad_output, Address grad_input) {
  TentParams p{};
  p.n = g[0], p.c = g[1], p.p = g[2], p.interleaved = g[3] != 0;
  p.bins = bins.data();
  p.bin_count = int64_t(bins.size());
  for (int64_t bin : bins) p.tents += bin + 1;
  p.input = at(input);
  p.output = at(output);
  p.grad_output = at(grad_output);
  p.grad_input = at(grad_input);
  with_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const Workspace workspace(tent_workspace_bytes<T>(p));
    if (output != 0) return tent_histogram_cuda<T>(p, workspace.get(), nullptr);
    tent_histogram_backward_cuda<T>(p, workspace.get(), nullptr);
  });
}

void values(const std::string& dtype, const std::array<int64_t, 4>& g, int64_t bins, Address input, Address output,
            Address grad_output, Address grad_input) {
  ValueHistogramParams p{};
  p.layout = g[3] != 0 ? CurveLayout{g[0], g[1], 1, g[1] * g[2], 0} : CurveLayout{g[0] * g[1], 1, 1, g[2], 0};
  p.bins = bins;
  p.input = at(input);
  p.output = at(output);
  p.grad_output = at(grad_output);
  p.grad_input = at(grad_input);
  with_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (output == 0) return value_histogram_backward_cuda<T>(p, nullptr);
    const Workspace workspace(value_histogram_workspace_bytes<T>(p));
    value_histogram_cuda<T>(p, workspace.get(), nullptr);
  });
}

void quantize(const std::string& dtype, int64_t count, int64_t levels, bool outside, Address input, Address output,
              Address grad_output, Address grad_input) {
  const QuantizeParams p{count, levels, outside, at(input), at(output), at(grad_output), at(grad_input)};
  with_type(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    output != 0 ? quantize_ste_cuda<T>(p, nullptr) : quantize_ste_backward_cuda<T>(p, nullptr);
  });
}

REGISTER_FAMILY(module) {
  module.def("crf_lookup", &lookup);
  module.def("crf_lookup_backward", &lookup_backward);
  module.def("crf_tents", &tents);
  module.def("crf_values", &values);
  module.def("crf_quantize", &quantize);
}

}  // namespace
}  // namespace hdrops
