// Entry points of the emulated response-curve kernels: what csrc/crf/bindings.h and merge_bindings.h are for torch, on
// addresses of memory that the tests own. The workspace begins as NaN and is of the size asked for, to the byte.
#include "arrays.h"
#include "crf/histogram_cuda.cuh"
#include "crf/lookup_cuda.cuh"
#include "crf/merge_backward_cuda.cuh"
#include "crf/merge_forward_cuda.cuh"
#include "crf/quantize_cuda.cuh"

namespace hdrops {
namespace {

using Address = uintptr_t;
using emulator::with_type;

void* at(Address address) { return reinterpret_cast<void*>(address); }

class Workspace {
 public:
  explicit Workspace(size_t bytes) : bytes_(bytes > 0 ? new unsigned char[bytes] : nullptr) {
    if (bytes > 0) memset(bytes_, 0xff, bytes);
  }
  ~Workspace() { delete[] bytes_; }
  Workspace(const Workspace&) = delete;
  void* get() const { return bytes_; }

 private:
  unsigned char* bytes_;
};

// Calls action of the pixels' type and the output's.
template <class Action>
void with_pixels(const std::string& in, const std::string& out, const Action& action) {
  with_type(out, [&](auto tag) {
    using Out = typename decltype(tag)::type;
    if (in == "uint8") return action(std::type_identity<uint8_t>(), tag);
    if (in == "uint16") return action(std::type_identity<uint16_t>(), tag);
    if (in != out) throw std::invalid_argument("pixels of " + in + " give no " + out);
    action(std::type_identity<Out>(), tag);
  });
}

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

// What a bracket is, as the tests name it.
struct EmulatedBracket {
  std::string dtype;               // of the stack
  bool wide;                       // computed in double
  std::array<int64_t, 4> sizes;    // batch, frames, channels, pixels
  std::array<int64_t, 2> strides;  // of the stack's images and frames
  bool interleaved, fallback;
  Address stack, log_exposures, curve, weight, mask;
  std::array<int64_t, 5> table_sizes;  // images of exposures; images, channels and length of the curve; weights
  std::string mask_kind;
  int64_t mask_stride;

  template <class A>
  MergeParams<A> params() const {
    MergeParams<A> p{};
    p.batch = sizes[0], p.frames = sizes[1], p.channels = sizes[2], p.pixels = sizes[3];
    p.interleaved = interleaved, p.fallback = fallback;
    p.stack = at(stack);
    p.stack_stride_n = strides[0], p.stack_stride_p = strides[1];
    p.curve = static_cast<const A*>(at(curve));
    p.curve_length = table_sizes[3];
    p.weight = static_cast<const A*>(at(weight));
    p.weight_length = table_sizes[4];
    p.mask = at(mask);
    p.mask_kind = mask_kind == "bool" ? MergeMask::boolean : mask_kind == "real" ? MergeMask::real : MergeMask::none;
    p.mask_stride_n = mask_stride;
    return p;
  }

  template <class A>
  MergeTablesOf<A> tables() const {
    return {static_cast<const A*>(at(log_exposures)), table_sizes[0], table_sizes[1], table_sizes[2]};
  }
};

template <class Action>
void with_stack(const EmulatedBracket& b, const Action& action) {
  const std::string out = b.dtype == "uint8" || b.dtype == "uint16" ? (b.wide ? "float64" : "float32") : b.dtype;
  with_pixels(b.dtype, out, action);
}

void merge(const EmulatedBracket& b, Address output) {
  with_stack(b, [&](auto in_tag, auto out_tag) {
    using T = typename decltype(in_tag)::type;
    using Out = typename decltype(out_tag)::type;
    using A = device_acc_t<Out>;
    if constexpr (!(kIsCode<T> && sizeof(Out) == 2)) {
      const MergeParams<A> p = b.params<A>();
      const MergeTablesOf<A> of = b.tables<A>();
      const Workspace workspace(merge_forward_workspace_bytes<T, Out, A>(p, of));
      merge_forward_cuda<T, Out, A>(p, of, static_cast<Out*>(at(output)), workspace.get(), nullptr);
    }
  });
}

void merge_backward(const EmulatedBracket& b, Address grad_output, Address grad_stack, Address grad_log_exposures,
                    Address grad_curve) {
  with_stack(b, [&](auto in_tag, auto out_tag) {
    using T = typename decltype(in_tag)::type;
    using Out = typename decltype(out_tag)::type;
    using A = device_acc_t<Out>;
    if constexpr (!(kIsCode<T> && sizeof(Out) == 2)) {
      const MergeParams<A> p = b.params<A>();
      const MergeTablesOf<A> of = b.tables<A>();
      const MergeOutputs<A> gradients{at(grad_stack), static_cast<A*>(at(grad_log_exposures)),
                                      static_cast<A*>(at(grad_curve))};
      const Workspace workspace(merge_backward_workspace_bytes<T, Out, A>(p, of, grad_curve != 0));
      merge_backward_cuda<T, Out, A>(p, of, static_cast<const Out*>(at(grad_output)), gradients, workspace.get(),
                                     nullptr);
    }
  });
}

REGISTER_FAMILY(module) {
  module.def("crf_lookup", &lookup);
  module.def("crf_lookup_backward", &lookup_backward);
  module.def("crf_tents", &tents);
  module.def("crf_values", &values);
  module.def("crf_quantize", &quantize);
  py::class_<EmulatedBracket>(module, "Bracket")
      .def(py::init<>())
      .def_readwrite("dtype", &EmulatedBracket::dtype)
      .def_readwrite("wide", &EmulatedBracket::wide)
      .def_readwrite("sizes", &EmulatedBracket::sizes)
      .def_readwrite("strides", &EmulatedBracket::strides)
      .def_readwrite("interleaved", &EmulatedBracket::interleaved)
      .def_readwrite("fallback", &EmulatedBracket::fallback)
      .def_readwrite("stack", &EmulatedBracket::stack)
      .def_readwrite("log_exposures", &EmulatedBracket::log_exposures)
      .def_readwrite("curve", &EmulatedBracket::curve)
      .def_readwrite("weight", &EmulatedBracket::weight)
      .def_readwrite("mask", &EmulatedBracket::mask)
      .def_readwrite("table_sizes", &EmulatedBracket::table_sizes)
      .def_readwrite("mask_kind", &EmulatedBracket::mask_kind)
      .def_readwrite("mask_stride", &EmulatedBracket::mask_stride);
  module.def("merge_exposures", &merge);
  module.def("merge_exposures_backward", &merge_backward);
}

}  // namespace
}  // namespace hdrops
