// Entry points of the emulated kernels of exposure merging: what csrc/crf/merge_bindings.h is for torch, on addresses
// of memory that the tests own.
#include "addresses.h"
#include "crf/merge_backward_cuda.cuh"
#include "crf/merge_forward_cuda.cuh"

namespace hdrops {
namespace {

using emulator::Address;
using emulator::at;
using emulator::with_pixels;
using emulator::Workspace;

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

// Calls action<T, Out>() with the types of frames and radiance.
template <class Action>
void with_stack(const EmulatedBracket& b, const Action& action) {
  const std::string out = b.dtype == "uint8" || b.dtype == "uint16" ? (b.wide ? "float64" : "float32") : b.dtype;
  with_pixels(b.dtype, out, [&](auto in_tag, auto out_tag) {
    using T = typename decltype(in_tag)::type;
    using Out = typename decltype(out_tag)::type;
    if constexpr (!(kIsCode<T> && sizeof(Out) == 2)) action.template operator()<T, Out>();
  });
}

void merge(const EmulatedBracket& b, Address output) {
  with_stack(b, [&]<class T, class Out>() {
    using A = device_acc_t<Out>;
    const MergeParams<A> p = b.params<A>();
    const MergeTablesOf<A> of = b.tables<A>();
    const Workspace workspace(merge_forward_workspace_bytes<T, Out, A>(p, of));
    merge_forward_cuda<T, Out, A>(p, of, static_cast<Out*>(at(output)), workspace.get(), nullptr);
  });
}

void merge_backward(const EmulatedBracket& b, Address grad_output, Address grad_stack, Address grad_log_exposures,
                    Address grad_curve) {
  with_stack(b, [&]<class T, class Out>() {
    using A = device_acc_t<Out>;
    const MergeParams<A> p = b.params<A>();
    const MergeTablesOf<A> of = b.tables<A>();
    const MergeOutputs<A> gradients{at(grad_stack), static_cast<A*>(at(grad_log_exposures)),
                                    static_cast<A*>(at(grad_curve))};
    const Workspace workspace(merge_backward_workspace_bytes<T, Out, A>(p, of, grad_curve != 0));
    merge_backward_cuda<T, Out, A>(p, of, static_cast<const Out*>(at(grad_output)), gradients, workspace.get(),
                                   nullptr);
  });
}

REGISTER_FAMILY(module) {
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
